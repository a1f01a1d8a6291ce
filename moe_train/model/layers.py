"""Basic layers: linear maps, RMS norm, embedding and head. Each weight gets its sharding when it is initialized."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from moe_train.model.sharding import fsdp, specs

RandomSource = nnx.Rngs | None
"""PRNG streams for initial weights; None for zeros, where only shapes matter and random numbers would only take time to trace."""


def normal(rngs: RandomSource, shape: tuple[int, ...], spec: P, stddev: float, dtype: jnp.dtype) -> nnx.Param:
    """Initialize a parameter with independent normal entries; the values are the same on every mesh.

    Args:
        rngs: PRNG streams; None for zeros.
        shape: shape of the parameter.
        spec: partition spec that the parameter is created with.
        stddev: standard deviation of the entries.
        dtype: dtype of the parameter.
    """
    if rngs is None:
        return nnx.Param(jnp.zeros(shape, dtype, out_sharding=spec))
    return nnx.Param(stddev * jax.random.normal(rngs.params(), shape, dtype, out_sharding=spec))


class RMSNorm(nnx.Module):
    """Root mean square norm, x / rms(x) * scale, computed in float32 (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((dim,), dtype, out_sharding=P(None)))
        self.eps = eps

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        if 1 in x.shape[:-1]:
            # JAX would sum the gradient over the other dims alone, which takes XLA:CPU thirty times as long as over all of them.
            scale = jax.lax.broadcast_in_dim(scale, x.shape, (x.ndim - 1,), out_sharding=specs.spec_of(x))
        return (normed * scale).astype(x.dtype)


class Adapted(nnx.Module):
    """A weight that can have a LoRA adapter.

    `model.lora` adds the factors lora_a (in dims, J) and lora_b (J, out dims), where J is the rank.
    """

    def __init__(self, weight: nnx.Param):
        self.weight = weight
        # `nnx.data` makes the attributes children of the pytree: `add_lora` puts arrays into them later.
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.lora_scale: float | tuple[tuple[float, int], ...] = 0.0
        """Scale of the LoRA delta; where experts differ, a tuple with (scale, rank) of each expert."""
        self.lora_dropout = 0.0

    def adapter(self) -> tuple[Float[Array, "..."], Float[Array, "..."]] | None:
        """Return the LoRA factors (A, scale * B), or None without an adapter.

        For an expert whose rank is less than J, B is zero past that rank, so that these entries get no gradient.
        """
        if self.lora_a is None or self.lora_b is None:
            return None
        a = self.lora_a[...]
        b = self.lora_b[...]
        if not isinstance(self.lora_scale, tuple):
            return a, b * self.lora_scale
        scales_E, ranks_E = np.array(self.lora_scale, np.float32).T
        # Ranks are padded to the largest one, J. Inside the scan over layers B is (E, J, out), hence the trailing dim.
        within_rank_EJ = np.arange(a.shape[-1]) < ranks_E[:, None]
        return a, b * np.where(within_rank_EJ, scales_E[:, None], np.float32(0))[..., None]

    def apply_dropout(self, x: Float[Array, "*dims"], key: Key[Array, ""] | None) -> Float[Array, "*dims"]:
        """Apply LoRA dropout to x, the input of the adapter.

        A fraction `lora_dropout` of the entries is set to zero and the others are scaled by 1 / (1 - lora_dropout). The same
        entries are dropped on every mesh.

        Args:
            x: input of the adapter.
            key: PRNG key; None for no dropout.
        """
        if key is None or self.lora_dropout == 0:
            return x
        # Drawn for all replicas and then indexed: each replica gets the numbers that a batch in one piece would get.
        count, replica = specs.replicas()
        spec = P(None, *specs.spec_of(x))
        kept = jax.random.bernoulli(key, 1 - self.lora_dropout, (count, *x.shape), out_sharding=spec)[replica]
        return jnp.where(kept, x / (1 - self.lora_dropout), 0)


def keys_of(key: Key[Array, ""] | None, count: int) -> list[Key[Array, ""] | None]:
    """Return one PRNG key for each of `count` parts, or `count` times None (no dropout) if `key` is None."""
    if key is None:
        return [None] * count
    return [jax.random.fold_in(key, i) for i in range(count)]


class Linear(Adapted):
    """A linear map without bias, given as an einsum.

    Args:
        rngs: PRNG streams for the weight.
        equation: einsum of input and weight, such as "BTD,DNH->BTNH".
        shape: shape of the weight, here (D, N, H).
        spec: partition spec of the weight.
        stddev: standard deviation of the initial entries.
        dtype: dtype of the weight.
    """

    def __init__(self, rngs: RandomSource, equation: str, shape: tuple[int, ...], spec: P, stddev: float, dtype: jnp.dtype):
        super().__init__(normal(rngs, shape, spec, stddev, dtype))
        self.equation = equation

    @property
    def summed_dim(self) -> int:
        """Index, counted from the end, of the last weight dim that the product sums over."""
        # The product may sum over several dims (N and H of o_proj); blocks of quantized values lie along the last of them.
        w, y = self.equation.split(",")[1].split("->")
        return max(i for i, letter in enumerate(w) if letter not in y) - len(w)

    def __call__(
        self, x: Float[Array, "..."], key: Key[Array, ""] | None = None, equation: str | None = None
    ) -> Float[Array, "..."]:
        """Apply the map and, if there is one, the LoRA adapter.

        Args:
            x: input with the dims of the equation's first operand.
            key: PRNG key for the dropout on the adapter's input; None for no dropout.
            equation: the same map with other letters, since `einsum` sums over dims in the order of the alphabet; None for the
                layer's own.
        """
        return self.apply(x, self.apply_dropout(x, key), equation=equation)

    def apply(
        self,
        x: Float[Array, "*dims"],
        adapter_input: Float[Array, "*dims"],
        saved: bool = True,
        equation: str | None = None,
    ) -> Float[Array, "..."]:
        """Apply the map to x, and the LoRA adapter, if there is one, to `adapter_input`, which is x after dropout.

        Args:
            x: input with the dims of the equation's first operand.
            adapter_input: input of the adapter.
            saved: whether remat `minimal` keeps the results for the backward pass.
            equation: as for a call.
        """
        equation = equation or self.equation
        y = fsdp.project(equation, x, self.weight[...], saved)
        adapter = self.adapter()
        if adapter is not None:
            a, b = adapter
            to_rank, from_rank = lora_equations(equation)
            low_rank = fsdp.project(to_rank, adapter_input, a, saved)
            y += fsdp.project(from_rank, low_rank, b, saved)
        return y


def lora_equations(equation: str) -> tuple[str, str]:
    """Split an einsum equation into two that pass through a rank J.

    `"BTD,DNH->BTNH"` becomes `("BTD,DJ->BTJ", "BTJ,JNH->BTNH")`.
    """
    operands, y = equation.split("->")
    x, w = operands.split(",")
    inputs = "".join(letter for letter in w if letter not in y)
    outputs = "".join(letter for letter in w if letter in y)
    rank = "".join(letter for letter in x if letter not in inputs) + "J"
    return f"{x},{inputs}J->{rank}", f"{rank},J{outputs}->{y}"


class Embedding(Adapted):
    """Token embeddings (V, D); a tied head uses the same table.

    The adapter's factors are A (V, J) and B (J, D); it has no dropout, as in PEFT.
    """

    def __init__(self, rngs: RandomSource, vocab_size: int, dim: int, stddev: float, dtype: jnp.dtype):
        super().__init__(normal(rngs, (vocab_size, dim), P(specs.split_axes(vocab_size), "fsdp"), stddev, dtype))

    def __call__(self, tokens_BT: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        x_BTD = fsdp.lookup(self.weight[...], tokens_BT, dtype)
        adapter = self.adapter()
        if adapter is not None:
            a_VJ, b_JD = adapter
            x_BTD += fsdp.project("BTJ,JD->BTD", fsdp.lookup(a_VJ, tokens_BT, dtype), b_JD)
        return x_BTD


class Head(Adapted):
    """The output matrix (V, D), which the loss applies. The adapter's factors are A (D, J) and B (J, V).

    Args:
        rngs: PRNG streams for the weights.
        outputs: number V of outputs: the vocabulary, or the scores of a classifier.
        dim: width D of the hidden states.
        stddev: standard deviation of the initial weights.
        dtype: dtype of the weights.
        split: whether the outputs are split over the mesh; a few scores are not.
    """

    def __init__(self, rngs: RandomSource, outputs: int, dim: int, stddev: float, dtype: jnp.dtype, split: bool = True):
        axes = specs.split_axes(outputs) if split else None
        super().__init__(normal(rngs, (outputs, dim), P(axes, "fsdp"), stddev, dtype))

    def lora_factors(
        self, x_BTD: Float[Array, "B T D"], key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "B T J"], Float[Array, "V J"]] | None:
        """Return the two factors whose product is the LoRA delta of the logits, or None without an adapter.

        Args:
            x_BTD: final hidden states.
            key: PRNG key for the dropout on the adapter's input; None for no dropout.

        Returns:
            x·A (B, T, J) and the transpose of scale * B (V, J).
        """
        adapter = self.adapter()
        if adapter is None:
            return None
        a_DJ, b_JV = adapter
        return fsdp.project("BTD,DJ->BTJ", self.apply_dropout(x_BTD, key), a_DJ), b_JV.T
