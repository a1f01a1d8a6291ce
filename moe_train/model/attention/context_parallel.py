"""Load-balanced (zig-zag) context parallelism: sequences split over the mesh axis `context`. Local view.

Under causal masking the last queries of a sequence see the most keys. Queries are therefore reordered before attention: of
2c chunks, device i of c computes attention for chunks i and 2c - 1 - i, which is equal work on every device.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_train.machine.mesh import axis_size


def parts(T: int) -> tuple[tuple[int, ...], ...]:
    """Return, for each device of `context`, the positions where its equally long runs of queries start.

    Args:
        T: length of the full sequence.
    """
    c = axis_size("context")
    return ((0,),) if c == 1 else tuple((i * run_len(T), (2 * c - 1 - i) * run_len(T)) for i in range(c))


def run_len(T: int) -> int:
    """Return the number of queries in one run, for a full sequence of T tokens."""
    return T if axis_size("context") == 1 else T // (2 * axis_size("context"))


def _owner(chunk: int) -> int:
    """Return the device of `context` that computes attention for a chunk."""
    return min(chunk, 2 * axis_size("context") - 1 - chunk)


def balanced(x_Bt: jax.Array) -> jax.Array:
    """Reorder the queries zig-zag: this device's chunks 2i and 2i + 1 are exchanged for chunks i and 2c - 1 - i.

    Args:
        x_Bt: this device's contiguous part of the sequence.
    """
    c = axis_size("context")
    if c == 1:
        return x_Bt
    # Of chunks i and 2c - 1 - i exactly one is even, so one permutation of the even chunks and one of the odd ones suffice.
    even, odd = (
        jax.lax.ppermute(chunk, "context", [(i, _owner(2 * i + j)) for i in range(c)])
        for j, chunk in enumerate(jnp.split(x_Bt, 2, axis=1))
    )
    first_is_even = jax.lax.axis_index("context") % 2 == 0
    return jnp.concatenate([jnp.where(first_is_even, even, odd), jnp.where(first_is_even, odd, even)], axis=1)


def in_order(x_Bt: jax.Array) -> jax.Array:
    """Undo `balanced`: return this device's contiguous part of the sequence."""
    c = axis_size("context")
    if c == 1:
        return x_Bt
    first, last = jnp.split(x_Bt, 2, axis=1)
    first_is_even = jax.lax.axis_index("context") % 2 == 0
    chunks = jnp.where(first_is_even, first, last), jnp.where(first_is_even, last, first)
    return jnp.concatenate(
        [jax.lax.ppermute(chunk, "context", [(_owner(2 * i + j), i) for i in range(c)]) for j, chunk in enumerate(chunks)], axis=1
    )
