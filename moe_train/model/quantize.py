"""Quantization of frozen weights (QLoRA, arXiv:2305.14314): quantized values, and one scale per block.

A block consists of some of the inputs of one output, as in bitsandbytes. It lies along the last dim that the product sums
over, which is not the last dim of the weight. So neither quantized nor dequantized values ever change lanes on a TPU; with
blocks along the last dim, XLA makes a second copy, in another layout, of the quantized values of all layers before it loops
over the layers.
A block is divided by its largest magnitude, and each quotient is rounded to the nearest of 16 levels (nf4) or to the nearest
of the 127ths (int8). The quantized values and scales of a weight are split over the mesh as the weight was; no block is
split. They take the place of the weight (`fsdp.project`, `experts`) and are dequantized just before a product.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from functools import partial
from types import EllipsisType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_train import config
from moe_train.machine.mesh import axis_size, platform
from moe_train.model.paths import ParameterPath

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Levels of 4-bit NormalFloat: quantiles of a normal distribution, with exact 0 and ends (appendix E of the paper)."""


Kind = Literal["nf4", "int8"]
"""Quantization formats, named as in `lora.quantize`."""


class Quantized(NamedTuple):
    """A quantized weight of shape (…, n · block_size, …)."""

    codes: Any
    """Quantized values: int8 of the weight's shape, or for nf4 uint8.

    A byte of nf4 holds two values: the low four bits come from the first half of a block, the high four from its second half.
    """
    scales: Any
    """Scales of the blocks (…, n, …), in the dtype of the weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        shape = list(self.codes.shape)
        shape[self.dim] *= 2 if self.codes.dtype == np.uint8 else 1
        return tuple(shape)

    @property
    def dim(self) -> int:
        """Dim, counted from the end, along which blocks lie: the one where `codes` and `scales` differ in size."""
        pairs = zip(self.codes.shape, self.scales.shape, strict=True)
        return next(i for i, (codes, scales) in enumerate(pairs) if codes != scales) - len(self.codes.shape)


def quantize(w: jax.Array, kind: Kind, block_size: int, dtype: Any, dim: int) -> Quantized:
    """Quantize a weight. Local view.

    Args:
        w: the weight, or this device's part of it.
        kind: format.
        block_size: number of values that share a scale; divides w.shape[dim].
        dtype: dtype of the scales.
        dim: dim along which blocks lie, counted from the end (negative).
    """
    lead, tail = w.shape[:dim], w.shape[w.ndim + dim + 1 :]
    blocks = w.astype(jnp.float32).reshape(*lead, -1, block_size, *tail)
    largest = 1 if kind == "nf4" else 127
    scales = (jnp.max(jnp.abs(blocks), axis=dim) / largest).astype(dtype)
    # Divide by the scales as rounded to `dtype`, which dequantization multiplies by. A block of zeros has scale 0.
    blocks = blocks / jnp.expand_dims(jnp.where(scales == 0, 1, scales).astype(jnp.float32), dim)
    if kind == "int8":
        return Quantized(jnp.clip(jnp.round(blocks), -127, 127).astype(jnp.int8).reshape(w.shape), scales)
    codes = jnp.zeros(blocks.shape, jnp.uint8)
    for low, high in itertools.pairwise(NF4):
        # The code is the number of midpoints between levels that the value exceeds.
        codes = codes + (blocks > (low + high) / 2).astype(jnp.uint8)
    first, second = jnp.split(codes, 2, axis=dim)
    return Quantized((first | second << 4).reshape(*lead, -1, *tail), scales)


def how_of(like: Quantized) -> tuple[Kind, int, Any, int]:
    """Return the arguments (kind, block_size, dtype, dim) of `quantize` that give arrays like these."""
    kind: Kind = "nf4" if like.codes.dtype == np.uint8 else "int8"
    return kind, like.shape[like.dim] // like.scales.shape[like.dim], like.scales.dtype, like.dim


def dequantize(weight: Quantized, dtype: jnp.dtype) -> jax.Array:
    """Return the weight that the quantized values stand for. Local view."""
    codes, scales = weight
    dim, after = weight.dim, codes.ndim + weight.dim + 1
    blocks = codes.reshape(*scales.shape[:after], -1, *scales.shape[after:])
    if codes.dtype == jnp.uint8:
        blocks = _levels(jnp.concatenate([blocks & 15, blocks >> 4], axis=dim))
    return (blocks.astype(jnp.float32) * jnp.expand_dims(scales.astype(jnp.float32), dim)).reshape(weight.shape).astype(dtype)


def _levels(codes: jax.Array) -> jax.Array:
    """Return NF4[codes]."""
    # XLA:CPU would keep an array in memory for each of the selections of `_selected`.
    if platform() == "cpu":
        return jnp.take(jnp.asarray(NF4, jnp.float32), codes, mode="clip")
    return _selected(codes)


def _selected(codes: jax.Array, first: int = 0, bit: int = 3) -> jax.Array:
    """Select NF4[codes] bit by bit, without a table lookup, which is slow on TPUs."""
    if bit < 0:
        return jnp.float32(NF4[first])
    return jnp.where((codes >> bit) & 1 == 1, _selected(codes, first + (1 << bit), bit - 1), _selected(codes, first, bit - 1))


# --- Quantized weights in a model ------------------------------------------------------------------------------------


class QuantizedWeight(nnx.Module):
    """A quantized replacement for the `weight` of a linear map; `weight[...]` returns both arrays."""

    def __init__(self, weight: Quantized):
        self.codes, self.scales = nnx.Param(weight.codes), nnx.Param(weight.scales)

    def __getitem__(self, _: EllipsisType) -> Quantized:
        return Quantized(self.codes[...], self.scales[...])


def quantize_weights(modules: Iterable[tuple[str, Any]], how: config.Nf4 | config.Int8) -> None:
    """Quantize the weight of each linear map, in place.

    Args:
        modules: (name, linear map) pairs.
        how: format and block size.

    Raises:
        ValueError: the block size does not divide a device's part of the inputs.
    """
    for name, module in modules:
        weight, dim = module.weight[...], module.summed_dim
        spec = jax.typeof(weight).sharding.spec
        split = (*spec, *(None,) * (weight.ndim - len(spec)))[dim]
        parts = math.prod(axis_size(axis) for axis in ((split,) if isinstance(split, str) else split or ()))
        size = weight.shape[dim] // parts
        if size % how.block_size:
            over = f" over mesh.{split} {parts} = {size}" if parts > 1 else ""
            raise ValueError(
                f"lora.quantize.block_size {how.block_size} does not divide the inputs of {name}, {weight.shape[dim]}{over}; "
                f"use {math.gcd(size, how.block_size)}"
            )
        local = partial(quantize, kind=how.name, block_size=how.block_size, dtype=weight.dtype, dim=dim)
        module.weight = QuantizedWeight(jax.shard_map(local, in_specs=spec, out_specs=spec)(weight))


def unquantized(shapes: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a model with weights in place of quantized values and scales.

    Args:
        shapes: {path: array or its shape} of a model that may have quantized weights.
    """
    found = {}
    for path, like in shapes.items():
        parsed = ParameterPath.parse(path)
        if parsed.part == "codes":
            scales = shapes[f"{parsed.weight}.scales"]
            found[parsed.weight] = jax.ShapeDtypeStruct(Quantized(like, scales).shape, scales.dtype, sharding=like.sharding)
        elif parsed.part != "scales":
            found[path] = jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=like.sharding)
    return found


def quantized(arrays: dict[str, jax.Array], abstract: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Quantize those of `arrays` that are quantized in `abstract`, one after the other, in place: the inverse of `unquantized`.

    Args:
        arrays: {path: array} with weights that are not quantized; changed in place.
        abstract: {path: array or its shape} of the quantized model.

    Returns:
        `arrays`.
    """
    for path, like in abstract.items():
        parsed = ParameterPath.parse(path)
        if parsed.part == "codes":
            weight = parsed.weight
            how = how_of(Quantized(like, abstract[f"{weight}.scales"]))
            arrays[path], arrays[f"{weight}.scales"] = _quantized(arrays.pop(weight), *how)
    return arrays


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantized(w: jax.Array, *how: Any) -> Quantized:
    spec = jax.typeof(w).sharding.spec
    return jax.shard_map(lambda w: quantize(w, *how), in_specs=spec, out_specs=spec)(w)
