"""Compute what an adapter adds to its weight, one matrix at a time on the host."""

from __future__ import annotations

import math

import numpy as np

from moe_train import config
from moe_train.model.lora import scale_of_expert
from moe_train.model.paths import ParameterPath, of_module
from moe_train.weights.arrays import LazyParameters, fetch_entry
from moe_train.weights.names import WeightPiece

MERGE_CHUNK_ENTRIES = 2**18
"""Entries that are computed at once, in float64, so that they stay in a core's cache."""


def scale_of(lora: config.Lora, module: str, lead: tuple[int, ...] = ()) -> float:
    """Return the factor of an adapter's product A·B.

    Args:
        lora: the section of the adapters.
        module: path of the module, such as `stacks.0.layers.0.attention.q_proj`.
        lead: (repeat, expert) of a routed expert, since experts may have different scales.
    """
    if len(lead) == 2:
        return scale_of_expert(lora, lora.targets_of(of_module(module).module), lead[1])[0]
    # Targets that name experts do not apply here: the dense first layers of a sparse model have no experts.
    return lora.scale(lora.targets_of(of_module(module).module, routed=False)[0])


def target_of(lora: config.Lora, module: str) -> config.LoraTarget:
    """Return the target that created the adapter of a module; the first one if several share its experts."""
    return lora.targets_of(of_module(module).module)[0]


def lora_delta(parameters: LazyParameters, lora: config.Lora | None, piece: WeightPiece) -> np.ndarray | None:
    """Return scale · A·B in float64, in the dims of the weight; None without an adapter."""
    factors = _factors(parameters, lora, piece)
    if factors is None:
        return None
    a, b = factors
    return np.tensordot(a, b, axes=1)


def merged(parameters: LazyParameters, lora: config.Lora | None, piece: WeightPiece, dtype: np.dtype) -> np.ndarray:
    """Return round(base + scale · A·B) in `dtype`, with a single rounding; without an adapter, the base's own values."""
    base = fetch_entry(parameters[piece.path], piece.lead)
    factors = _factors(parameters, lora, piece)
    if factors is None:
        return base.astype(dtype, copy=False)
    a, b = factors
    # All in dims become rows and all out dims columns; A has the weight's in dims, followed by the rank.
    inputs = math.prod(a.shape[:-1])
    rank = len(b)
    weight = base.reshape(inputs, -1)
    a = a.reshape(inputs, rank)
    b = b.reshape(rank, -1)
    if weight.flags.f_contiguous:  # read from a file as (out, in); processing rows of that is several times as fast
        return _add_product(weight.T, b.T, a.T, dtype).T.reshape(base.shape)
    return _add_product(weight, a, b, dtype).reshape(base.shape)


def _add_product(weight: np.ndarray, a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return weight + a·b: sums are formed in float64, a few rows at a time, and rounded once when they are stored."""
    out = np.empty(weight.shape, dtype)
    step = max(1, MERGE_CHUNK_ENTRIES // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        out[rows] = a[rows] @ b + weight[rows]
    return out


def _factors(parameters: LazyParameters, lora: config.Lora | None, piece: WeightPiece) -> tuple[np.ndarray, np.ndarray] | None:
    """Return two matrices in float64 whose product is added to the weight; None without an adapter."""
    path = ParameterPath.parse(piece.path)
    module = path.module_path
    if not path.has_adapter(parameters):
        return None
    if lora is None:
        raise ValueError(f"{module} has an adapter, but its alpha is unknown; pass the config's section `lora`")
    a, b = (fetch_entry(parameters[name], piece.lead).astype(np.float64) for name in path.adapter)
    scale = scale_of(lora, module, piece.lead)
    if path.is_head:  # the head's weight is (V, D), like the embedding's, but its A is (D, J) and its B (J, V)
        return scale * b.T, a.T
    return scale * a, b
