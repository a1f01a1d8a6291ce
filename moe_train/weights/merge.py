"""What an adapter adds to the weight beside it, one matrix at a time on the host."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import jax
import numpy as np

from moe_train import config
from moe_train.weights.arrays import fetch
from moe_train.weights.names import Piece


def target_of(lora: config.Lora, module: str) -> config.LoraTarget:
    """The target that put the adapter beside a module, e.g. `stacks.0.layers.0.attention.q_proj`."""
    name = ".".join(module.split(".")[-2:])
    (target,) = (t for t in lora.targets if any(fnmatchcase(name, pattern) for pattern in t.modules))
    return target


def scale_of(lora: config.Lora, module: str) -> float:
    """alpha / rank of the adapter beside a module."""
    target = target_of(lora, module)
    return target.alpha / target.rank


def delta(parameters: Mapping[str, jax.Array], lora: config.Lora | None, piece: Piece) -> np.ndarray | None:
    """scale · A·B in float64, in the dims of the weight; None where there is no adapter."""
    module = piece.path.removesuffix(".weight")
    if f"{module}.lora_a" not in parameters:
        return None
    if lora is None:
        raise ValueError(f"{module} has an adapter, but nothing says its alpha; give the section lora")
    a, b = (fetch(parameters[f"{module}.{name}"], piece.lead).astype(np.float64) for name in ("lora_a", "lora_b"))
    return np.tensordot(scale_of(lora, module) * a, b, axes=1)


def merged(parameters: Mapping[str, jax.Array], lora: config.Lora | None, piece: Piece, dtype: np.dtype) -> np.ndarray:
    """round(base + scale · A·B) in `dtype`: one rounding. The base's own values where there is no adapter."""
    base = fetch(parameters[piece.path], piece.lead)
    added = delta(parameters, lora, piece)
    return base.astype(dtype) if added is None else (base.astype(np.float64) + added).astype(dtype)
