"""The small parts: linear maps, RMS norm, embedding. Weights carry their sharding from birth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_train.model import fsdp


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], spec: P, stddev: float, dtype: jnp.dtype) -> nnx.Param:
    """A parameter of independent normal entries; the same numbers on every mesh."""
    return nnx.Param(stddev * jax.random.normal(rngs.params(), shape, dtype, out_sharding=spec))


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32 (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((dim,), dtype, out_sharding=P(None)))
        self.eps = eps

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
    """A linear map without bias, said as an einsum: `equation` "BTD,DNH->BTNH", weight (D, N, H).

    `model.lora` puts `lora_a` (in dims, J) and `lora_b` (J, out dims) beside the weight.
    """

    def __init__(self, rngs: nnx.Rngs, equation: str, shape: tuple[int, ...], spec: P, stddev: float, dtype: jnp.dtype):
        self.weight = normal(rngs, shape, spec, stddev, dtype)
        self.equation = equation
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.lora_scale = 0.0

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = fsdp.project(self.equation, x, self.weight[...])
        if self.lora_a is not None and self.lora_b is not None:
            to_rank, from_rank = lora_equations(self.equation)
            y += self.lora_scale * fsdp.project(from_rank, fsdp.project(to_rank, x, self.lora_a[...]), self.lora_b[...])
        return y


def lora_equations(equation: str) -> tuple[str, str]:
    """`"BTD,DNH->BTNH"` -> the same map through a rank J: `"BTD,DJ->BTJ"`, `"BTJ,JNH->BTNH"`."""
    operands, y = equation.split("->")
    x, w = operands.split(",")
    inputs = "".join(letter for letter in w if letter not in y)
    outputs = "".join(letter for letter in w if letter in y)
    rank = "".join(letter for letter in x if letter not in inputs) + "J"
    return f"{x},{inputs}J->{rank}", f"{rank},J{outputs}->{y}"


class Embedding(nnx.Module):
    """Token embeddings; a tied head uses the same table."""

    def __init__(self, rngs: nnx.Rngs, vocab_size: int, dim: int, stddev: float, dtype: jnp.dtype):
        self.weight = normal(rngs, (vocab_size, dim), P("tensor", "fsdp"), stddev, dtype)

    def __call__(self, tokens_BT: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        return fsdp.lookup(self.weight[...], tokens_BT, dtype)
