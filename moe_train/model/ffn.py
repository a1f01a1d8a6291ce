"""The dense feed-forward layer: SwiGLU (arXiv:2002.05202)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

from moe_train import config
from moe_train.model.layers import Linear, RandomSource, keys_of


class DenseFfn(nnx.Module):
    """SwiGLU feed-forward layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, rngs: RandomSource, model: config.Model, compute: config.Compute, ffn_dim: int):
        D = model.model_dim
        F = ffn_dim
        std = model.init_stddev
        dtype = jnp.dtype(compute.param_dtype)
        self.gate_proj = Linear(rngs, "BTD,DF->BTF", (D, F), P("fsdp", "tensor"), std, dtype)
        self.up_proj = Linear(rngs, "BTD,DF->BTF", (D, F), P("fsdp", "tensor"), std, dtype)
        self.down_proj = Linear(rngs, "BTF,FD->BTD", (F, D), P("tensor", "fsdp"), std, dtype)

    def __call__(self, x_BTD: Float[Array, "B T D"], key: Key[Array, ""] | None = None) -> Float[Array, "B T D"]:
        """Apply the layer.

        Args:
            x_BTD: normalized hidden states.
            key: PRNG key for the dropout of the adapters; None for no dropout.
        """
        gate_key, up_key, down_key = keys_of(key, 3)
        return self.down_proj(jax.nn.silu(self.gate_proj(x_BTD, gate_key)) * self.up_proj(x_BTD, up_key), down_key)
