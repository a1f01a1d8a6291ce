"""Split PEFT's fused adapters of experts into per-expert ones; fused adapters are read and never written.

For a parameter (E, out, in) such as `mlp.experts.gate_up_proj`, PEFT keeps one A (r·E, in), expert after expert, and one B
(out, r·E), of which every E-th column belongs to the same expert (`ParamWrapper.get_delta_weight`). The names state only
`experts` and `experts.base_layer`, so shapes must tell gate_up from down. PEFT up to 0.19.0 mistook (E, out, in) for
(E, in, out): there A and B are swapped and transposed. The shapes reveal that too, except if model_dim equals ffn_dim or twice
ffn_dim; then the version in adapter_config.json decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_train import config
from moe_train.weights.on_disk import FileTensor
from moe_train.weights.peft.settings import alpha_of

_NAME = re.compile(r"(?P<layer>.*\.)mlp\.experts\.(base_layer\.)?lora_(?P<matrix>[AB])\.weight")
_LEAVES = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
"""A fused parameter, and the matrices of an expert that its rows contain."""
_FIRST_NOT_SWAPPED = (0, 19, 1)
"""The first version of PEFT that does not swap A and B."""


@dataclass(frozen=True)
class _Part:
    """A matrix of one expert: some rows and columns of a fused matrix, transposed if `transposed` is set."""

    name: str
    shape: tuple[int, int]
    tensor: FileTensor
    rows: slice
    columns: slice
    transposed: bool

    @property
    def dtype(self) -> np.dtype:
        return self.tensor.dtype

    def read(self, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        part = self.tensor.read((self.rows,))[:, self.columns]
        return np.ascontiguousarray((part.T if self.transposed else part)[index])


def split_fused(
    where: object, tensors: Mapping[str, FileTensor], model: config.Model, version: str | None
) -> dict[str, FileTensor]:
    """Replace each fused pair by the pairs of the experts, under the names of a per-expert adapter.

    Args:
        where: the file, for messages.
        tensors: tensors of the file by name.
        model: the architecture of the base.
        version: PEFT's version, as the file states it; None if it does not.

    Raises:
        ValueError: the shapes do not fit the model, or two versions of PEFT would read them differently.
    """
    fused: dict[str, re.Match[str]] = {}
    for name in tensors:
        match = _NAME.fullmatch(name)
        if match:
            fused[name] = match
    unfused = {name: tensor for name, tensor in tensors.items() if name not in fused}
    for stem, layer in sorted({(name.rpartition(".lora_")[0], match["layer"]) for name, match in fused.items()}):
        pair = [f"{stem}.lora_{matrix}.weight" for matrix in "AB"]
        if missing := [name for name in pair if name not in tensors]:
            raise ValueError(f"{where} lacks {missing[0]}")
        experts = _experts(where, layer, tensors[pair[0]], tensors[pair[1]], model, version)
        if duplicates := sorted(unfused.keys() & experts.keys()):
            raise ValueError(f"{where} has {duplicates[0]} twice, once in {pair[0]}")
        unfused |= experts
    return unfused


def _experts(
    where: object, layer: str, a: FileTensor, b: FileTensor, model: config.Model, version: str | None
) -> dict[str, FileTensor]:
    assert isinstance(model.ffn, config.MoeFfn)
    D, F, E = model.model_dim, model.ffn.ffn_dim, model.ffn.num_experts
    sizes = {"gate_up_proj": (D, 2 * F), "down_proj": (F, D)}  # in, out
    (wide, into), (out, narrow) = a.shape, b.shape
    straight = [parameter for parameter, size in sizes.items() if size == (into, out)]
    swapped = [parameter for parameter, size in sizes.items() if size == (out, into)]
    if wide != narrow or wide % E or not straight + swapped:
        raise ValueError(f"{where}: {a.name} of shape {a.shape} and its lora_B of {b.shape} fit neither gate_up_proj nor down_proj")
    if straight and swapped:
        parsed_version = _parse(version)
        if parsed_version is None:
            raise ValueError(
                f"{where}: {a.name} can be read in two ways, since model_dim {D} and ffn_dim {F} make a square matrix, and "
                "adapter_config.json does not state peft_version; load and save it with PEFT 0.19.1 or later"
            )
        if parsed_version >= _FIRST_NOT_SWAPPED:
            swapped = []
        else:
            straight = []
    (parameter,) = straight or swapped
    J = wide // E
    full = slice(None)
    parts: dict[str, FileTensor] = {}
    for e in range(E):
        slice_a = slice(e * J, (e + 1) * J)  # expert-major rows
        slice_b = slice(e, None, E)  # rank-major columns
        for i, leaf in enumerate(_LEAVES[parameter]):
            size = sizes[parameter][1] // len(_LEAVES[parameter])
            rows = slice(i * size, (i + 1) * size)
            stem = f"{layer}block_sparse_moe.experts.{e}.{leaf}"
            name_a = f"{stem}.lora_A.weight"
            name_b = f"{stem}.lora_B.weight"
            width = sizes[parameter][0]
            if straight:
                parts[name_a] = _Part(name_a, (J, width), a, slice_a, full, False)
                parts[name_b] = _Part(name_b, (size, J), b, rows, slice_b, False)
            else:
                parts[name_a] = _Part(name_a, (J, width), b, full, slice_b, True)
                parts[name_b] = _Part(name_b, (size, J), a, slice_a, rows, True)
    return parts


def _parse(version: str | None) -> tuple[int, ...] | None:
    """Parse a version: 0.19.1.dev0@UNKNOWN -> (0, 19, 1)."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version or "")
    return tuple(int(part) for part in match.groups()) if match else None


def alpha_pattern(settings: Mapping[str, Any], model: config.Model) -> dict[str, float]:
    """Return the `alpha_pattern`, preceded by an entry for each expert matrix with the alpha of its fused parameter."""
    expert_alphas: dict[str, float] = {}
    for layer in range(model.num_layers):
        for parameter, leaves in _LEAVES.items():
            pattern = rf"layers\.{layer}\.block_sparse_moe\.experts\.\d+\.({'|'.join(leaves)})"
            expert_alphas[pattern] = alpha_of(settings, f"model.layers.{layer}.mlp.experts.{parameter}")
    return expert_alphas | (settings.get("alpha_pattern") or {})
