"""Split PEFT's fused adapters of experts into per-expert ones; `fused_parameters` does the opposite.

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
from typing import NamedTuple

import numpy as np

from moe_train import config
from moe_train.machine.files import JsonObject
from moe_train.weights.on_disk import FileTensor
from moe_train.weights.peft.pieces import ADAPTER_CONFIG, has_linear_experts
from moe_train.weights.peft.settings import alpha_of, rank_of

_NAME = re.compile(r"(?P<layer>.*\.)mlp\.experts\.(base_layer\.)?lora_(?P<matrix>[AB])\.weight")
_OF_MIXTRAL = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
_OF_OTHERS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_FIRST_NOT_SWAPPED = (0, 19, 1)
"""The first version of PEFT that does not swap A and B."""


class _ExpertNames(NamedTuple):
    """Names of the matrices of an expert within a layer."""

    container: str
    leaves: Mapping[str, tuple[str, ...]]
    """A fused parameter, and the matrices of an expert that its rows contain."""


def _expert_names(model: config.Model) -> _ExpertNames:
    """Return the names that `pieces.matrix_for_each_expert` gives to the experts of a model."""
    if has_linear_experts(model):
        return _ExpertNames("block_sparse_moe.experts", _OF_MIXTRAL)
    return _ExpertNames("mlp.experts", _OF_OTHERS)


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
        """Dtype of what `read` returns."""
        return self.tensor.dtype

    def read(self, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Read the part at `index` of this expert's matrix."""
        # `read` takes slices of step 1 only, while B's columns of one expert are num_experts apart.
        part = self.tensor.read((self.rows,))[:, self.columns]
        if self.transposed:
            part = part.T
        return np.ascontiguousarray(part[index])


def split_fused(
    source: object, tensors: Mapping[str, FileTensor], model: config.Model, settings: JsonObject
) -> dict[str, FileTensor]:
    """Replace each fused pair by the pairs of the experts, under the names of a per-expert adapter.

    Args:
        source: the file, for messages.
        tensors: tensors of the file by name.
        model: the architecture of the base.
        settings: adapter_config.json.

    Raises:
        ValueError: the shapes do not fit the model, two versions of PEFT would read them differently, or the settings state another
            rank.
    """
    fused: dict[str, re.Match[str]] = {}
    for name in tensors:
        match = _NAME.fullmatch(name)
        if match:
            fused[name] = match
    unfused = {name: tensor for name, tensor in tensors.items() if name not in fused}
    stems = {name.rpartition(".lora_")[0]: match["layer"] for name, match in fused.items()}
    for stem, layer in sorted(stems.items()):
        name_a = f"{stem}.lora_A.weight"
        name_b = f"{stem}.lora_B.weight"
        if missing := [name for name in (name_a, name_b) if name not in tensors]:
            raise ValueError(f"{source} lacks {missing[0]}; save the adapter again")
        experts = _split_pair(source, layer, tensors[name_a], tensors[name_b], model, settings)
        if duplicates := sorted(unfused.keys() & experts.keys()):
            raise ValueError(f"{source} has {duplicates[0]} twice, once in {name_a}; remove one of the two")
        unfused |= experts
    return unfused


class _FusedPair(NamedTuple):
    """What a fused pair of A and B is."""

    parameter: str
    """The fused parameter: gate_up_proj or down_proj."""
    swapped: bool
    """Whether A and B are swapped and transposed."""
    in_dim: int
    out_dim: int
    """Sizes of the parameter of one expert."""


def _identify(source: object, a: FileTensor, b: FileTensor, model_dim: int, ffn: config.MoeFfn, version: str | None) -> _FusedPair:
    """Find out by their shapes which parameter A and B belong to, and whether they are swapped."""
    parameter_sizes = {"gate_up_proj": (model_dim, 2 * ffn.ffn_dim), "down_proj": (ffn.ffn_dim, model_dim)}  # in, out
    for tensor in (a, b):
        if len(tensor.shape) != 2:
            raise ValueError(f"{source}: {tensor.name} has shape {tensor.shape}; A and B of a fused adapter are matrices")
    total_rank, a_size = a.shape
    b_size, b_rank = b.shape
    straight: list[_FusedPair] = []
    swapped: list[_FusedPair] = []
    for parameter, (in_dim, out_dim) in parameter_sizes.items():
        if (a_size, b_size) == (in_dim, out_dim):
            straight.append(_FusedPair(parameter, False, in_dim, out_dim))
        if (b_size, a_size) == (in_dim, out_dim):
            swapped.append(_FusedPair(parameter, True, in_dim, out_dim))
    if total_rank != b_rank or total_rank % ffn.num_experts or not straight + swapped:
        raise ValueError(
            f"{source}: {a.name} of shape {a.shape} and its lora_B of {b.shape} fit neither gate_up_proj nor down_proj"
        )
    if straight and swapped:
        parsed_version = _parse(version)
        if parsed_version is None:
            raise ValueError(
                f"{source}: {a.name} can be read in two ways, since model_dim {model_dim} and ffn_dim {ffn.ffn_dim} make a square "
                "matrix, and adapter_config.json does not state peft_version; load and save it with PEFT 0.19.1 or later"
            )
        if parsed_version < _FIRST_NOT_SWAPPED:
            return swapped[0]
    return (straight or swapped)[0]


def _split_pair(
    source: object, layer: str, a: FileTensor, b: FileTensor, model: config.Model, settings: JsonObject
) -> dict[str, FileTensor]:
    """Return the A and B of each expert that a fused pair contains."""
    assert isinstance(model.ffn, config.MoeFfn)
    fused = _identify(source, a, b, model.model_dim, model.ffn, settings.get("peft_version"))
    _check_settings(source, f"{layer}mlp.experts.{fused.parameter}".removeprefix("base_model.model."), a, model.ffn, settings)
    container, leaves_of = _expert_names(model)
    leaves = leaves_of[fused.parameter]
    num_experts = model.ffn.num_experts
    rank = a.shape[0] // num_experts
    leaf_size = fused.out_dim // len(leaves)
    everything = slice(None)
    parts: dict[str, FileTensor] = {}
    for expert in range(num_experts):
        ranks_of_a = slice(expert * rank, (expert + 1) * rank)  # A has the ranks of one expert after those of another
        ranks_of_b = slice(expert, None, num_experts)  # B has one rank of each expert in turn
        for i, leaf in enumerate(leaves):
            outputs = slice(i * leaf_size, (i + 1) * leaf_size)
            stem = f"{layer}{container}.{expert}.{leaf}"
            name_a = f"{stem}.lora_A.weight"
            name_b = f"{stem}.lora_B.weight"
            if fused.swapped:
                parts[name_a] = _Part(name_a, (rank, fused.in_dim), b, everything, ranks_of_b, transposed=True)
                parts[name_b] = _Part(name_b, (leaf_size, rank), a, ranks_of_a, outputs, transposed=True)
            else:
                parts[name_a] = _Part(name_a, (rank, fused.in_dim), a, ranks_of_a, everything, transposed=False)
                parts[name_b] = _Part(name_b, (leaf_size, rank), b, outputs, ranks_of_b, transposed=False)
    return parts


def _check_settings(source: object, parameter: str, a: FileTensor, ffn: config.MoeFfn, settings: JsonObject) -> None:
    """Raise ValueError unless the settings select a fused parameter, and state the rank that its A has."""
    if not any(f".{parameter}".endswith(f".{target}") for target in settings.get("target_parameters") or ()):
        raise ValueError(
            f"{source}: {a.name} adapts {parameter}, which target_parameters of {ADAPTER_CONFIG} does not name, so that PEFT would "
            "leave it out or scale it otherwise; add it, with its rank and alpha, or remove the tensors"
        )
    rank = a.shape[0] // ffn.num_experts
    stated = rank_of(settings, parameter)
    if rank != stated:
        raise ValueError(
            f"{source}: {a.name} has rank {rank} for each of {ffn.num_experts} experts, but r and rank_pattern of {ADAPTER_CONFIG} "
            f"state {stated} for {parameter}, with which PEFT cannot load it; correct them"
        )


def _parse(version: str | None) -> tuple[int, ...] | None:
    """Parse a version: 0.19.1.dev0@UNKNOWN -> (0, 19, 1)."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version or "")
    if match is None:
        return None
    return tuple(int(number) for number in match.groups())


def alpha_pattern(settings: JsonObject, model: config.Model) -> dict[str, float]:
    """Return the `alpha_pattern`, preceded by an entry for each expert matrix with the alpha of its fused parameter."""
    container, leaves_of = _expert_names(model)
    expert_alphas: dict[str, float] = {}
    for layer in range(model.num_layers):
        for parameter, leaves in leaves_of.items():
            # `split_fused` gives the tensors per-expert names, so the alphas have to be found under these.
            pattern = rf"layers\.{layer}\.{re.escape(container)}\.\d+\.({'|'.join(leaves)})"
            expert_alphas[pattern] = alpha_of(settings, f"model.layers.{layer}.mlp.experts.{parameter}")
        if any(name.endswith("gate.weight") for name in settings["target_parameters"]):
            alpha = alpha_of(settings, f"model.layers.{layer}.mlp.gate.weight")
            expert_alphas[rf"layers\.{layer}\.block_sparse_moe\.gate"] = alpha
    # In this order, since the first pattern that matches decides.
    return expert_alphas | (settings.get("alpha_pattern") or {})
