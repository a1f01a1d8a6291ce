"""Scaling of queries by their position, as in Llama 4."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_train import config


def query_scale(scaling: config.QueryScaling, positions_BT: Int[Array, "B T"]) -> Float[Array, "B T 1 1"]:
    """Return the factor on the queries (B, T, 1, 1): 1 + beta * log(1 + floor(position / original_max_seq_len))."""
    blocks = jnp.maximum(positions_BT, 0) // scaling.original_max_seq_len  # padding may have position -1
    return (1 + scaling.beta * jnp.log1p(blocks.astype(jnp.float32)))[:, :, None, None]
