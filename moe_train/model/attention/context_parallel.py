"""Sequences split over the mesh axis `context`: which queries a device attends for. Local view.

The last queries of a sequence see the most keys, so queries change places with its other end first: of 2c chunks device
i attends for chunk i and chunk 2c - 1 - i, which is as much work on every device.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_train.machine.mesh import axis_size


def parts(T: int) -> tuple[tuple[int, ...], ...]:
    """Of each device of `context`: where the equally long runs of queries begin that it attends for."""
    c = axis_size("context")
    return ((0,),) if c == 1 else tuple((i * run_len(T), (2 * c - 1 - i) * run_len(T)) for i in range(c))


def run_len(T: int) -> int:
    """Queries of a run."""
    return T if axis_size("context") == 1 else T // (2 * axis_size("context"))


def _owner(chunk: int) -> int:
    return min(chunk, 2 * axis_size("context") - 1 - chunk)


def balanced(x_Bt: jax.Array) -> jax.Array:
    """This device's part of the sequence, chunks 2i and 2i + 1 -> chunks i and 2c - 1 - i, one of which is even."""
    c = axis_size("context")
    if c == 1:
        return x_Bt
    even, odd = (
        jax.lax.ppermute(chunk, "context", [(i, _owner(2 * i + j)) for i in range(c)])
        for j, chunk in enumerate(jnp.split(x_Bt, 2, axis=1))
    )
    first_is_even = jax.lax.axis_index("context") % 2 == 0
    return jnp.concatenate([jnp.where(first_is_even, even, odd), jnp.where(first_is_even, odd, even)], axis=1)


def in_order(x_Bt: jax.Array) -> jax.Array:
    """The way back from `balanced`."""
    c = axis_size("context")
    if c == 1:
        return x_Bt
    first, last = jnp.split(x_Bt, 2, axis=1)
    first_is_even = jax.lax.axis_index("context") % 2 == 0
    chunks = jnp.where(first_is_even, first, last), jnp.where(first_is_even, last, first)
    return jnp.concatenate(
        [jax.lax.ppermute(chunk, "context", [(_owner(2 * i + j), i) for i in range(c)]) for j, chunk in enumerate(chunks)], axis=1
    )
