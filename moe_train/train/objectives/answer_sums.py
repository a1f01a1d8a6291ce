"""Sums over the answers of a batch, whose positions may be split over the devices of `context`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_train.machine.mesh import batch_axes
from moe_train.model.sharding.specs import place


def sum_by_answer(values_BT: Float[Array, "B T"], answer_ids_BT: Int[Array, "B T"]) -> Float[Array, "B K"]:
    """Sum values over the positions of each answer. Global view.

    Args:
        values_BT: one value for each position.
        answer_ids_BT: number of the answer that a position belongs to, from 1; 0 for none.

    Returns:
        The sums in float32: column k - 1 holds answer k of the row, and 0 where a row has fewer. There are as many columns as
        positions, rounded up to an even number.
    """
    columns = values_BT.shape[1] + values_BT.shape[1] % 2
    tokens = P(batch_axes(), "context")

    def local(values_bt: Float[Array, "b t"], ids_bt: Int[Array, "b t"]) -> Float[Array, "b K"]:
        rows_bt = jnp.broadcast_to(jnp.arange(ids_bt.shape[0])[:, None], ids_bt.shape)
        # Column 0 gathers what belongs to no answer.
        zeros = jax.lax.full_like(values_bt, 0, jnp.float32, (ids_bt.shape[0], columns + 1))
        sums = zeros.at[rows_bt, ids_bt].add(values_bt.astype(jnp.float32))
        return jax.lax.psum(sums, "context")[:, 1:]

    by_answer = jax.shard_map(local, in_specs=(tokens, tokens), out_specs=P(batch_axes(), None))
    return by_answer(place(values_BT, "BT"), place(answer_ids_BT, "BT"))


def pairs_of(sums_BK: Float[Array, "B K"]) -> tuple[Float[Array, "B P"], Float[Array, "B P"]]:
    """Return the sums of the first and of the second answer of each pair."""
    pairs_BP2 = sums_BK.reshape(sums_BK.shape[0], -1, 2)
    return pairs_BP2[..., 0], pairs_BP2[..., 1]


def count_pairs(answer_ids_BT: Int[Array, "B T"]) -> Int[Array, ""]:
    """Count the pairs of answers in a batch."""
    return jnp.sum(jnp.max(answer_ids_BT, axis=1)) // 2
