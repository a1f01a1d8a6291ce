"""Quantization of frozen weights (QLoRA, arXiv:2305.14314): quantized values, and one scale per block.

A block consists of some of the inputs of one output, as in bitsandbytes. It lies along the last dim that the product sums
over, which is not the last dim of the weight. So neither quantized nor dequantized values ever change lanes on a TPU; with
blocks along the last dim, XLA makes a second copy, in another layout, of the quantized values of all layers before it loops
over the layers.
A block is divided by its largest magnitude, and each quotient is rounded to the nearest of 16 levels (nf4), of the 127ths
(int8) or of the numbers of e4m3 over its largest, 448 (fp8). The quantized values and scales of a weight are split over the mesh
as the weight was; no block is split. They take the place of the weight (`fsdp.project`, `experts`) and are dequantized just
before a product.
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
from jaxtyping import Array, Float, Int8, Shaped, UInt8

from moe_train import config
from moe_train.machine.mesh import axis_size, platform
from moe_train.model.paths import ParameterPath

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Levels of 4-bit NormalFloat: quantiles of a normal distribution, with exact 0 and ends (appendix E of the paper)."""

QuantizationFormat = Literal["nf4", "int8", "fp8"]
"""Quantization formats, named as in `lora.quantize`."""


_MAX_LEVEL: dict[QuantizationFormat, int] = {"nf4": 1, "int8": 127, "fp8": 448}
"""Quantized value of the largest magnitude of a block."""
BIASED = 127 - 7
"""Difference between the exponent biases of float32 and e4m3."""


class Quantized(NamedTuple):
    """A quantized weight of shape (…, n · block_size, …)."""

    # Not annotated as arrays: maps over a model put shapes and partition specs in their place.
    codes: Any
    """Quantized values: int8 of the weight's shape, or for nf4 uint8.

    For fp8 they are the bits of e4m3 numbers: XLA would widen arrays of float8, of all layers at once, to float16 for devices that
    do not compute with float8.

    A byte of nf4 holds two values: the low four bits come from the first half of a block, the high four from its second half.
    """
    scales: Any
    """Scales of the blocks (…, n, …), in the dtype of the weight.

    For fp8 they are the bits of float32 numbers as uint32, whatever the dtype of the weight: float32 holds the scales of any file,
    and the dtype tells fp8 from int8.
    """

    @property
    def kind(self) -> QuantizationFormat:
        """Format, which the dtypes tell."""
        if self.codes.dtype == np.uint8:
            return "nf4"
        return "fp8" if self.scales.dtype == np.uint32 else "int8"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        shape = list(self.codes.shape)
        shape[self.dim] *= 2 if self.kind == "nf4" else 1
        return tuple(shape)

    @property
    def dim(self) -> int:
        """Dim, counted from the end, along which blocks lie: the one where `codes` and `scales` differ in size."""
        pairs = zip(self.codes.shape, self.scales.shape, strict=True)
        return next(i for i, (codes, scales) in enumerate(pairs) if codes != scales) - len(self.codes.shape)


def quantize(w: Float[Array, "..."], kind: QuantizationFormat, block_size: int, dtype: jnp.dtype, dim: int) -> Quantized:
    """Quantize a weight. Local view.

    Args:
        w: the weight, or this device's part of it.
        kind: format.
        block_size: number of values that share a scale; divides w.shape[dim].
        dtype: dtype of the scales; without effect for fp8, whose scales are float32.
        dim: dim along which blocks lie, counted from the end (negative).
    """
    lead, tail = w.shape[:dim], w.shape[w.ndim + dim + 1 :]
    blocks = w.astype(jnp.float32).reshape(*lead, -1, block_size, *tail)
    scales = (jnp.max(jnp.abs(blocks), axis=dim) / _MAX_LEVEL[kind]).astype(jnp.float32 if kind == "fp8" else dtype)
    # Divide by the scales as rounded to `dtype`, which dequantization multiplies by. A block of zeros has scale 0.
    blocks = blocks / jnp.expand_dims(jnp.where(scales == 0, 1, scales).astype(jnp.float32), dim)
    if kind == "int8":
        # A quotient can exceed 127 where the scale was rounded down.
        return Quantized(jnp.clip(jnp.round(blocks), -127, 127).astype(jnp.int8).reshape(w.shape), scales)
    if kind == "fp8":
        return Quantized(_to_e4m3(jnp.clip(blocks, -448, 448)).reshape(w.shape), jax.lax.bitcast_convert_type(scales, jnp.uint32))
    codes = jnp.zeros(blocks.shape, jnp.uint8)
    # One midpoint after the other: an array of all 15 comparisons would be 15 times as large as the weight.
    for low, high in itertools.pairwise(NF4):
        # The code is the number of midpoints between levels that the value exceeds.
        codes = codes + (blocks > (low + high) / 2).astype(jnp.uint8)
    # A byte takes one value from each half of the block, so no value moves along the lanes.
    first, second = jnp.split(codes, 2, axis=dim)
    return Quantized((first | second << 4).reshape(*lead, -1, *tail), scales)


def quantization_of(like: Quantized) -> tuple[QuantizationFormat, int, jnp.dtype, int]:
    """Return the arguments (kind, block_size, dtype, dim) of `quantize` that give arrays like these."""
    return like.kind, like.shape[like.dim] // like.scales.shape[like.dim], like.scales.dtype, like.dim


def dequantize(weight: Quantized, dtype: jnp.dtype) -> Float[Array, "..."]:
    """Return the weight that the quantized values stand for. Local view."""
    codes, scales = weight
    dim = weight.dim
    after = codes.ndim + dim + 1  # index of the first dim after the blocks
    blocks = codes.reshape(*scales.shape[:after], -1, *scales.shape[after:])
    match weight.kind:
        case "nf4":
            blocks = _levels(jnp.concatenate([blocks & 15, blocks >> 4], axis=dim))
        case "fp8":
            blocks = _from_e4m3(blocks)
            scales = jax.lax.bitcast_convert_type(scales, jnp.float32)
    values = blocks.astype(jnp.float32) * jnp.expand_dims(scales.astype(jnp.float32), dim)
    return values.reshape(weight.shape).astype(dtype)


def _to_e4m3(x: Float[Array, "*dims"]) -> Int8[Array, "*dims"]:
    """Return the bits of the nearest e4m3 numbers, ties to even; x is float32 between -448 and 448.

    Integer arithmetic, since not every device converts to float8, and some round twice on the way.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # 20 of float32's 23 bits of mantissa are dropped; adding just under half of them, and one if the result is odd, rounds.
    rounded = (bits & 0x7FFFFFFF) + 0x7FFFF + (bits >> 20 & 1)
    normal = (rounded >> 20) - (BIASED << 3)
    subnormal = jnp.round(jnp.abs(x) * 512).astype(jnp.uint32)  # multiples of 2^-9
    codes = jnp.where(jnp.abs(x) < 2.0**-6, subnormal, normal) | (bits >> 31 << 7)
    return jax.lax.bitcast_convert_type(codes.astype(jnp.uint8), jnp.int8)


def _from_e4m3(codes: Int8[Array, "*dims"]) -> Float[Array, "*dims"]:
    """Return the float32 numbers of the bits of e4m3 numbers, none of which is NaN."""
    bits = jax.lax.bitcast_convert_type(codes, jnp.uint8).astype(jnp.uint32)
    magnitude = bits & 0x7F
    normal = jax.lax.bitcast_convert_type((magnitude + (BIASED << 3)) << 20 | bits >> 7 << 31, jnp.float32)
    subnormal = jnp.where(bits >> 7 == 1, -1.0, 1.0) * magnitude.astype(jnp.float32) * 2.0**-9
    return jnp.where(magnitude < 8, subnormal, normal)


def _levels(codes: UInt8[Array, "*dims"]) -> Float[Array, "*dims"]:
    """Return NF4[codes]."""
    # XLA:CPU would keep an array in memory for each of the selections of `_select`, and XLA:GPU one for each of its levels, in
    # float32 and throughout the step: 110 GiB for Mixtral 8x7B on one H100, where a table takes 53.
    if platform() != "tpu":
        return jnp.take(jnp.asarray(NF4, jnp.float32), codes, mode="clip")
    return _select(codes)


def _select(codes: UInt8[Array, "..."], first: int = 0, bit: int = 3) -> Float[Array, "..."]:
    """Select NF4[codes] bit by bit, without a table lookup, which is slow on TPUs."""
    if bit < 0:
        return jnp.float32(NF4[first])
    high = _select(codes, first + (1 << bit), bit - 1)
    low = _select(codes, first, bit - 1)
    return jnp.where((codes >> bit) & 1 == 1, high, low)


# --- Quantized weights in a model ------------------------------------------------------------------------------------


class QuantizedWeight(nnx.Module):
    """A quantized replacement for the `weight` of a linear map; `weight[...]` returns both arrays."""

    def __init__(self, weight: Quantized):
        self.codes = nnx.Param(weight.codes)
        self.scales = nnx.Param(weight.scales)

    def __getitem__(self, _: EllipsisType) -> Quantized:
        return Quantized(self.codes[...], self.scales[...])


def quantize_weights(linear_maps: Iterable[tuple[str, Any]], settings: config.Nf4 | config.Int8 | config.Fp8) -> None:
    """Quantize the weight of each linear map, in place.

    Args:
        linear_maps: (name, linear map) pairs.
        settings: format and block size.

    Raises:
        ValueError: the block size does not divide a device's part of the inputs.
    """
    block_size = settings.block_size
    for name, linear in linear_maps:
        weight = linear.weight[...]
        dim = linear.summed_dim
        spec = jax.typeof(weight).sharding.spec
        # A spec may leave out trailing dims that are not split.
        split = (*spec, *(None,) * (weight.ndim - len(spec)))[dim]
        axes = (split,) if isinstance(split, str) else split or ()
        devices = math.prod(axis_size(axis) for axis in axes)
        size = weight.shape[dim] // devices
        if size % block_size:
            over = f" over mesh.{split} {devices} = {size}" if devices > 1 else ""
            raise ValueError(
                f"lora.quantize.block_size {block_size} does not divide the inputs of {name}, {weight.shape[dim]}{over}; "
                f"use {math.gcd(size, block_size)}"
            )
        local = partial(quantize, kind=settings.name, block_size=block_size, dtype=weight.dtype, dim=dim)
        # Codes and scales have as many dims as the weight, and no block is split, so the weight's spec fits both.
        linear.weight = QuantizedWeight(jax.shard_map(local, in_specs=spec, out_specs=spec)(weight))


def unquantized_shapes(shapes: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a model with weights in place of quantized values and scales.

    Args:
        shapes: {path: array or its shape} of a model that may have quantized weights.
    """
    plain = {}
    for path, like in shapes.items():
        parsed = ParameterPath.parse(path)
        if parsed.part == "codes":
            scales = shapes[f"{parsed.weight}.scales"]
            quantized = Quantized(like, scales)
            dtype = np.dtype(np.float32) if quantized.kind == "fp8" else scales.dtype
            plain[parsed.weight] = jax.ShapeDtypeStruct(quantized.shape, dtype, sharding=like.sharding)
        elif parsed.part != "scales":
            plain[path] = jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=like.sharding)
    return plain


def quantize_like(arrays: dict[str, Shaped[Array, "..."]], abstract: Mapping[str, Any]) -> dict[str, Shaped[Array, "..."]]:
    """Quantize those of `arrays` that are quantized in `abstract`, one after the other, in place.

    It undoes what `unquantized_shapes` describes.

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
            arguments = quantization_of(Quantized(like, abstract[f"{weight}.scales"]))
            # The weight is released before the next one is quantized.
            arrays[path], arrays[f"{weight}.scales"] = _quantize_global(arrays.pop(weight), *arguments)
    return arrays


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize_global(w: Float[Array, "..."], *arguments: Any) -> Quantized:
    """Apply `quantize` to a weight in global view."""
    spec = jax.typeof(w).sharding.spec
    return jax.shard_map(lambda w: quantize(w, *arguments), in_specs=spec, out_specs=spec)(w)
