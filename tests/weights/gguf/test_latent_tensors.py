"""kv_b in two parts: every part of the joined matrix that can be read, and files that do not fit together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from moe_train.weights.gguf.latent_tensors import join_latents, split_latents, split_shapes
from tests.tiny import LATENT

N, R, n, v = LATENT.num_heads, LATENT.kv_lora_rank, LATENT.qk_nope_head_dim, LATENT.v_head_dim
MATRIX = np.random.default_rng(0).normal(size=(N * (n + v), R)).astype(np.float32)


class Tensor(NamedTuple):
    name: str
    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    def read(self, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        return self.values[index]


def tensors(**changes: np.ndarray | None) -> dict[str, Tensor]:
    keys, values = split_latents(MATRIX, LATENT)
    arrays = {"attn_k_b": keys, "attn_v_b": values, "attn_norm": np.ones(3, np.float32), **changes}
    return {f"blk.2.{name}.weight": Tensor(f"blk.2.{name}.weight", x) for name, x in arrays.items() if x is not None}


def test_the_parts_are_those_of_llama_cpp() -> None:
    keys, values = split_latents(MATRIX, LATENT)
    (k_name, k_shape), (v_name, v_shape) = split_shapes("blk.2.attn_kv_b.weight", LATENT)
    assert (k_name, v_name) == ("blk.2.attn_k_b.weight", "blk.2.attn_v_b.weight")
    assert keys.shape == k_shape == (N, R, n) and values.shape == v_shape == (N, v, R)
    for head in range(N):
        rows = MATRIX[head * (n + v) : (head + 1) * (n + v)]
        np.testing.assert_array_equal(keys[head], rows[:n].T)
        np.testing.assert_array_equal(values[head], rows[n:])


@pytest.mark.parametrize("rows", [(0, N * (n + v)), (n + v, 3 * (n + v)), (5, 21), (0, 0), (63, 64)])
@pytest.mark.parametrize("columns", [None, (0, R), (3, 5)])
def test_any_part_of_the_joined_matrix_is_read(rows: tuple[int, int], columns: tuple[int, int] | None) -> None:
    joined = join_latents(tensors())
    assert joined.keys() == {"blk.2.attn_kv_b.weight", "blk.2.attn_norm.weight"}
    kv_b = joined["blk.2.attn_kv_b.weight"]
    assert kv_b.shape == MATRIX.shape and kv_b.dtype == np.float32
    index = (slice(*rows),) if columns is None else (slice(*rows), slice(*columns))
    np.testing.assert_array_equal(kv_b.read(index), MATRIX[index])
    np.testing.assert_array_equal(kv_b.read(), MATRIX)


def test_parts_of_two_dtypes_are_read_in_the_wider_one() -> None:
    keys, _ = split_latents(MATRIX, LATENT)
    kv_b = join_latents(tensors(attn_k_b=keys.astype(np.float16)))["blk.2.attn_kv_b.weight"]
    assert kv_b.dtype == np.float32
    np.testing.assert_allclose(kv_b.read(), MATRIX, atol=2e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_k_b": None}, "blk.2.attn_k_b.weight is missing; convert the model again"),
        ({"attn_v_b": None}, "blk.2.attn_v_b.weight is missing; convert the model again"),
        ({"attn_v_b": np.zeros((N, R, v), np.float32)}, "do not fit together"),
        ({"attn_k_b": np.zeros((N, R), np.float32)}, "do not fit together"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes: dict[str, np.ndarray | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        join_latents(tensors(**changes))
