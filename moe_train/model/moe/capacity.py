"""Expert capacity: assignments beyond an expert's limit are dropped, and the token continues without that expert.

An expert takes at most C = ceil(capacity_factor * T * A / E) assignments of a sequence (a row of T tokens, padding
included); over all M tokens of a microbatch that is capacity_factor * M * A / E. Earlier tokens take precedence, and each
token's best expert takes precedence among its experts. What is dropped therefore depends on the row only: not on the mesh,
the microbatch or other rows, and not on later tokens, which a causal model must not see. (GShard, arXiv:2006.16668, also
limits groups of tokens, but gives all first choices precedence over second choices, which looks ahead.)
"""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moe_train.machine.mesh import axis_size
from moe_train.model.sharding.local_view import index_along


def capacity(capacity_factor: float, seq_len: int, experts_per_token: int, num_experts: int) -> int:
    """Return C, the largest number of assignments of one sequence that an expert takes."""
    # A fraction of the decimal text is exact; a float product could round up to one assignment more.
    return math.ceil(Fraction(str(capacity_factor)) * seq_len * experts_per_token / num_experts)


def within_capacity(ids_btA: Int[Array, "b t A"], num_experts: int, capacity_factor: float) -> Int[Array, "b t A"]:
    """Replace the expert ids of dropped assignments by `num_experts`. Local view.

    Assignments that already have the id `num_experts` (padding) use no capacity.

    Args:
        ids_btA: expert ids of this device's tokens, each token's best expert first.
        num_experts: number of experts, E.
        capacity_factor: see the module docstring.

    Returns:
        Expert ids (b, t, A), `num_experts` where dropped.
    """
    b, t, A = ids_btA.shape
    E = num_experts
    ids_bn = ids_btA.reshape(b, t * A)
    counts_bE = jnp.sum(ids_bn[..., None] == jnp.arange(E), axis=1, dtype=jnp.int32)
    before_bE = jnp.zeros_like(counts_bE)
    if axis_size("context") > 1:
        # A row may be split over `context`: assignments of earlier parts of the row come first.
        counts_xbE = jax.lax.all_gather(counts_bE, "context")
        earlier_x = jnp.arange(counts_xbE.shape[0]) < index_along("context")
        before_bE = jnp.sum(counts_xbE * earlier_x[:, None, None], axis=0)
    # argsort of a stable argsort gives each assignment's place in the order by expert, then by token.
    place_bn = jnp.argsort(jnp.argsort(ids_bn, axis=1, stable=True), axis=1)
    first_bE = jnp.cumsum(counts_bE, axis=1) - counts_bE  # position of each expert's first assignment
    # From position in the order to rank among the expert's own; the id E (padding) gets an entry too.
    to_rank_bE = jnp.pad(before_bE - first_bE, ((0, 0), (0, 1)))
    rank_bn = place_bn + jnp.take_along_axis(to_rank_bE, ids_bn, axis=1)
    limit = capacity(capacity_factor, t * axis_size("context"), A, E)
    return jnp.where(rank_bn < limit, ids_bn, E).reshape(b, t, A)
