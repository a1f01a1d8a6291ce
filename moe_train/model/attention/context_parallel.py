"""Load-balanced (zig-zag) context parallelism: sequences split over the mesh axis `context`. Local view, but for `gather_sequence`.

Under causal masking the last queries of a sequence see the most keys. Queries are therefore reordered before attention: of
2c chunks, device i of c computes attention for chunks i and 2c - 1 - i, which is equal work on every device.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from moe_train.machine.mesh import axis_size, batch_axes
from moe_train.model.sharding.collectives import gather_axis

RunStarts = tuple[tuple[int, ...], ...]
"""For each device of `context`, the positions where its runs of queries start."""


def gather_sequence(x_BTX: Shaped[Array, "B T X"]) -> Shaped[Array, "B S X"]:
    """Give each device of `context` the numbers of the whole sequence; in the backward pass their gradients are scattered.

    Global view: with c devices, S is c * T, and each device's part of it is a copy of the sequence. Products with the copies,
    and the gradients of their weights, are therefore sharded and summed like those of any other tokens.
    """
    spec = P(batch_axes(), "context", None)
    return jax.shard_map(partial(gather_axis, axis="context", dim=1), in_specs=spec, out_specs=spec)(x_BTX)


def run_starts(T: int) -> RunStarts:
    """Return, for each device of `context`, the positions where its equally long runs of queries start.

    Args:
        T: length of the full sequence.
    """
    c = axis_size("context")
    if c == 1:
        return ((0,),)
    run = run_len(T)
    return tuple((i * run, (2 * c - 1 - i) * run) for i in range(c))


def run_len(T: int) -> int:
    """Return the number of queries in one run, for a full sequence of T tokens."""
    c = axis_size("context")
    return T if c == 1 else T // (2 * c)


def _owner(chunk: int) -> int:
    """Return the device of `context` that computes attention for a chunk."""
    # A chunk and its mirror image have the same owner, whose index is the smaller of the two.
    return min(chunk, 2 * axis_size("context") - 1 - chunk)


def to_zigzag(x_Bt: Shaped[Array, "B t ..."]) -> Shaped[Array, "B t ..."]:
    """Reorder the queries zig-zag: this device's chunks 2i and 2i + 1 are exchanged for chunks i and 2c - 1 - i.

    Args:
        x_Bt: this device's contiguous part of the sequence.
    """
    c = axis_size("context")
    if c == 1:
        return x_Bt
    # Of chunks i and 2c - 1 - i exactly one is even, so one permutation of the even chunks and one of the odd ones suffice.
    even, odd = jnp.split(x_Bt, 2, axis=1)
    even = jax.lax.ppermute(even, "context", [(i, _owner(2 * i)) for i in range(c)])
    odd = jax.lax.ppermute(odd, "context", [(i, _owner(2 * i + 1)) for i in range(c)])
    first_is_even = jax.lax.axis_index("context") % 2 == 0
    # Device i's first chunk is chunk i, which came with the even chunks exactly if i is even.
    return jnp.concatenate([jnp.where(first_is_even, even, odd), jnp.where(first_is_even, odd, even)], axis=1)


def from_zigzag(x_Bt: Shaped[Array, "B t ..."]) -> Shaped[Array, "B t ..."]:
    """Undo `to_zigzag`: return this device's contiguous part of the sequence."""
    c = axis_size("context")
    if c == 1:
        return x_Bt
    first, last = jnp.split(x_Bt, 2, axis=1)
    first_is_even = jax.lax.axis_index("context") % 2 == 0
    even = jnp.where(first_is_even, first, last)
    odd = jnp.where(first_is_even, last, first)
    even = jax.lax.ppermute(even, "context", [(_owner(2 * i), i) for i in range(c)])
    odd = jax.lax.ppermute(odd, "context", [(_owner(2 * i + 1), i) for i in range(c)])
    return jnp.concatenate([even, odd], axis=1)
