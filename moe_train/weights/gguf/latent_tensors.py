"""The tensors of latent attention in GGUF files: llama.cpp stores kv_b in two parts, with the keys' part transposed.

`attn_k_b` (N, R, n) maps a query without its rotary part into the latent, and `attn_v_b` (N, v, R) maps a latent to values: the
absorbed form of the attention. Everything else in this package has both in one matrix, `attn_kv_b` (N * (n + v), R).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from moe_train import config
from moe_train.weights.on_disk import FileTensor

KV_B = "attn_kv_b.weight"
"""Last part of the name of the joined matrix."""
_K_B = "attn_k_b.weight"
_V_B = "attn_v_b.weight"


class JoinedLatents(NamedTuple):
    """`attn_k_b` and `attn_v_b` of one layer, read as the matrix `attn_kv_b`."""

    name: str
    keys: FileTensor
    values: FileTensor

    @property
    def _head_rows(self) -> int:
        """Rows of a head: dims of its keys without the rotary ones, then of its values."""
        return self.keys.shape[2] + self.values.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the joined matrix."""
        return self.keys.shape[0] * self._head_rows, self.keys.shape[1]

    @property
    def dtype(self) -> np.dtype:
        """Dtype of what `read` returns."""
        # Blocks of a quantized type may fit the rows of only one of the two.
        return np.promote_types(self.keys.dtype, self.values.dtype)

    def read(self, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Read the part at `index` into memory: step-1 slices of leading dims; () is the whole matrix."""
        rows, columns = (*index, slice(None), slice(None))[:2]
        assert isinstance(rows, slice) and isinstance(columns, slice), index
        start, stop, _ = rows.indices(self.shape[0])
        size = self._head_rows
        # Heads that the rows touch; a matrix is read head by head, but hashed in arbitrary runs of rows.
        heads = slice(start // size, -(-stop // size))
        keys = self.keys.read((heads, columns)).transpose(0, 2, 1)
        values = self.values.read((heads, slice(None), columns))
        joined = np.concatenate([keys.astype(self.dtype), values.astype(self.dtype)], axis=1)
        first = heads.start * size
        return joined.reshape(-1, joined.shape[-1])[start - first : stop - first]


def join_latents(tensors: Mapping[str, FileTensor]) -> dict[str, FileTensor]:
    """Return the tensors with each pair of `attn_k_b` and `attn_v_b` replaced by the joined matrix.

    Raises:
        ValueError: one of a pair is missing, or their shapes do not fit together.
    """
    joined: dict[str, FileTensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(_V_B):
            partner = name.removesuffix(_V_B) + _K_B
            if partner not in tensors:
                raise ValueError(f"{name} is there, but {partner} is missing; convert the model again")
        elif name.endswith(_K_B):
            pair = name.removesuffix(_K_B)
            values = tensors.get(pair + _V_B)
            if values is None:
                raise ValueError(f"{name} is there, but {pair}{_V_B} is missing; convert the model again")
            _check_shapes(tensor, values)
            joined[pair + KV_B] = JoinedLatents(pair + KV_B, tensor, values)
        else:
            joined[name] = tensor
    return joined


def _check_shapes(keys: FileTensor, values: FileTensor) -> None:
    """Raise ValueError unless both tensors have the same heads and the same latent."""
    is_pair = len(keys.shape) == len(values.shape) == 3 and keys.shape[:2] == (values.shape[0], values.shape[2])
    if not is_pair:
        raise ValueError(
            f"{keys.name} {keys.shape} and {values.name} {values.shape} do not fit together; their shapes have to be "
            "(heads, kv_lora_rank, dims of a key) and (heads, dims of a value, kv_lora_rank)"
        )


class SplitShapes(NamedTuple):
    """Names and shapes of the two tensors that a joined matrix is written as, in the order of the file."""

    keys: tuple[str, tuple[int, ...]]
    values: tuple[str, tuple[int, ...]]


def split_shapes(name: str, attention: config.MultiHeadLatentAttention) -> SplitShapes:
    """Return the two tensors of the joined matrix with this name."""
    prefix = name.removesuffix(KV_B)
    N = attention.num_heads
    R = attention.kv_lora_rank
    return SplitShapes((prefix + _K_B, (N, R, attention.qk_nope_head_dim)), (prefix + _V_B, (N, attention.v_head_dim, R)))


def split_latents(matrix: np.ndarray, attention: config.MultiHeadLatentAttention) -> tuple[np.ndarray, np.ndarray]:
    """Split the joined matrix (N * (n + v), R) into the values of `attn_k_b` and `attn_v_b`."""
    heads = matrix.reshape(attention.num_heads, -1, attention.kv_lora_rank)
    n = attention.qk_nope_head_dim
    return np.ascontiguousarray(heads[:, :n].transpose(0, 2, 1)), np.ascontiguousarray(heads[:, n:])
