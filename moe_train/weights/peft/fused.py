"""Fused PEFT adapters of experts, as the per-expert ones that they stand for; read, never written.

For a parameter (E, out, in) such as `mlp.experts.gate_up_proj`, PEFT keeps one A (r·E, in), expert after expert, and one B
(out, r·E), of which every E-th column is an expert's (`ParamWrapper.get_delta_weight`). The names say no more than
`experts` and `experts.base_layer`, so it is the shapes that tell gate_up from down. PEFT up to 0.19.0 took (E, out, in) for
(E, in, out): there A and B have each other's place and are transposed. That shows in the shapes too, except where
model_dim is ffn_dim or twice that: then the version in adapter_config.json has to say it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_train import config
from moe_train.weights.on_disk import Tensor

_NAME = re.compile(r"(?P<layer>.*\.)mlp\.experts\.(base_layer\.)?lora_(?P<matrix>[AB])\.weight")
_LEAVES = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
"""A fused parameter, and the matrices of an expert that lie in its rows."""
_FIRST_RIGHT = (0, 19, 1)


@dataclass(frozen=True)
class _Part:
    """Some rows and columns of a matrix, transposed where asked: a matrix of one expert."""

    name: str
    shape: tuple[int, int]
    tensor: Tensor
    rows: slice
    columns: slice
    transposed: bool

    @property
    def dtype(self) -> np.dtype:
        return self.tensor.dtype

    def read(self, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        part = self.tensor.read((self.rows,))[:, self.columns]
        return np.ascontiguousarray((part.T if self.transposed else part)[index])


def split(where: object, tensors: Mapping[str, Tensor], model: config.Model, version: str | None) -> dict[str, Tensor]:
    """The tensors with fused pairs replaced by each expert's, under the names of a per-expert adapter.

    version: of PEFT, as the file states it. Raises ValueError for shapes that are not this model's, or that two versions
    would read differently.
    """
    fused = {name: match for name in tensors if (match := _NAME.fullmatch(name))}
    found = {name: tensor for name, tensor in tensors.items() if name not in fused}
    for stem, layer in sorted({(name.rpartition(".lora_")[0], match["layer"]) for name, match in fused.items()}):
        pair = [f"{stem}.lora_{matrix}.weight" for matrix in "AB"]
        if missing := [name for name in pair if name not in tensors]:
            raise ValueError(f"{where} lacks {missing[0]}")
        experts = _experts(where, layer, tensors[pair[0]], tensors[pair[1]], model, version)
        if twice := sorted(found.keys() & experts.keys()):
            raise ValueError(f"{where} has {twice[0]} twice, once in {pair[0]}")
        found |= experts
    return found


def _experts(where: object, layer: str, a: Tensor, b: Tensor, model: config.Model, version: str | None) -> dict[str, Tensor]:
    assert isinstance(model.ffn, config.MoeFfn)
    D, F, E = model.model_dim, model.ffn.ffn_dim, model.ffn.num_experts
    sizes = {"gate_up_proj": (D, 2 * F), "down_proj": (F, D)}  # in, out
    (wide, into), (out, narrow) = a.shape, b.shape
    straight = [parameter for parameter, size in sizes.items() if size == (into, out)]
    swapped = [parameter for parameter, size in sizes.items() if size == (out, into)]
    if wide != narrow or wide % E or not straight + swapped:
        raise ValueError(f"{where}: {a.name} of shape {a.shape} and its lora_B of {b.shape} fit neither gate_up_proj nor down_proj")
    if straight and swapped:
        known = _parse(version)
        if known is None:
            raise ValueError(
                f"{where}: {a.name} can be read in two ways, since model_dim {D} and ffn_dim {F} make a square matrix, and "
                "adapter_config.json does not state peft_version; load and save it with PEFT 0.19.1 or later"
            )
        straight, swapped = (straight, []) if known >= _FIRST_RIGHT else ([], swapped)
    (parameter,) = straight or swapped
    J, every = wide // E, slice(None)
    found: dict[str, Tensor] = {}
    for e in range(E):
        of_a, of_b = slice(e * J, (e + 1) * J), slice(e, None, E)  # expert-major rows, rank-major columns
        for i, leaf in enumerate(_LEAVES[parameter]):
            size = sizes[parameter][1] // len(_LEAVES[parameter])
            rows = slice(i * size, (i + 1) * size)
            stem = f"{layer}block_sparse_moe.experts.{e}.{leaf}"
            name_a, name_b, width = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", sizes[parameter][0]
            if straight:
                found[name_a] = _Part(name_a, (J, width), a, of_a, every, False)
                found[name_b] = _Part(name_b, (size, J), b, rows, of_b, False)
            else:
                found[name_a] = _Part(name_a, (J, width), b, every, of_b, True)
                found[name_b] = _Part(name_b, (size, J), a, of_a, rows, True)
    return found


def _parse(version: str | None) -> tuple[int, ...] | None:
    """0.19.1.dev0@UNKNOWN -> (0, 19, 1)"""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version or "")
    return tuple(int(part) for part in match.groups()) if match else None


def alpha_pattern(settings: Mapping[str, Any], model: config.Model) -> dict[str, float]:
    """`alpha_pattern` with what it says of fused parameters said of each expert's matrices, which come first."""
    given: dict[str, float] = settings.get("alpha_pattern") or {}
    found: dict[str, float] = {}
    for layer in config.sparse_layers(model):
        for parameter, leaves in _LEAVES.items():
            name = f"model.layers.{layer}.mlp.experts.{parameter}"
            alphas = [alpha for key, alpha in given.items() if re.match(rf"(.*\.)?({key})$", name)]
            found[rf"layers\.{layer}\.block_sparse_moe\.experts\.\d+\.({'|'.join(leaves)})"] = (alphas or [settings["lora_alpha"]])[
                0
            ]
    return found | given
