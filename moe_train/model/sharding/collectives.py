"""Gather the parts of an array along a mesh axis, and scatter sums back; each is the gradient of the other. Local view.

Both are written to minimize the bytes moved. Asked for a reduce-scatter, XLA:TPU (libtpu of JAX 0.10) all-reduces the whole
array instead, which doubles the bytes that a device receives, in three cases:
- along an axis that all devices of a slice lie on; of 64 devices and more it also gathers by such an all-reduce. Split into
  two stages, one over devices far apart and one over neighbours, it does scatter, and moves as many bytes as in one stage;
- inside each slice, if an axis spans several slices: it scatters between slices only. So the first stages are inside a slice
  and the last one between slices, which therefore carries the smallest possible part. XLA itself takes a gather in the
  reverse of that order;
- if a device keeps no more than 128 entries, the lanes of a register, of the dim that lies along the lanes; over several
  slices, for any number of entries. So such a dim is swapped with the one before it, and the small part that is kept is
  swapped back.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from moe_train.machine.mesh import axis_size, platform, slices_along

LANES = 128
"""Lanes of a TPU register."""

Groups = list[list[int]]
"""Groups of positions along an axis; the devices of a group send to each other."""


def gather(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Concatenate the parts of x along a mesh axis on dim `dim`.

    An axis of one device is skipped: XLA would keep the collective and change the weight's layout for it.

    Args:
        x: this device's part.
        axis: mesh axis.
        dim: dim of x that `axis` splits.
    """
    if axis_size(axis) == 1:
        return x
    return _gather(x, axis, dim) if jnp.issubdtype(x.dtype, jnp.floating) else _gathered(x, axis, dim)


def _gathered(x: jax.Array, axis: str, dim: int) -> jax.Array:
    inside, between = _stages(axis)
    for groups in [None] if between else inside[::-1]:
        x = jax.lax.all_gather(x, axis, axis=dim, tiled=True, axis_index_groups=groups)
    return x


def scatter(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Sum x over a mesh axis and return this device's part of dim `dim`.

    Args:
        x: this device's summand, of the full size on `dim`.
        axis: mesh axis.
        dim: dim to split over `axis`.
    """
    devices = axis_size(axis)
    if devices == 1:
        return x
    inside, between = _stages(axis)
    if platform() == "tpu" and 0 < dim == x.ndim - 1 and (between or x.shape[dim] // devices <= LANES):
        rows = jnp.swapaxes(x, dim - 1, dim)
        # Without the constraint XLA would undo the swap in the memory layout.
        rows = with_layout_constraint(rows, Layout(tuple(range(rows.ndim))))
        return jnp.swapaxes(scatter(rows, axis, dim - 1), dim - 1, dim)
    # A first dim of size 1 (one expert per device) also makes XLA:TPU all-reduce the whole array.
    if x.shape[0] == 1 and dim > 0:
        return scatter(x[0], axis, dim - 1)[None]
    # Devices of a slice keep neighbouring parts: first each device's part of every slice's part, then the part of its own slice.
    if between:
        lead, tail = x.shape[:dim], x.shape[dim + 1 :]
        x = _scattered(x.reshape(*lead, len(between[0]), -1, *tail), axis, dim + 1, inside)
        return _scattered(x, axis, dim, [between]).reshape(*lead, -1, *tail)
    return _scattered(x, axis, dim, inside)


def _scattered(x: jax.Array, axis: str, dim: int, stages: list[Groups] | list[None]) -> jax.Array:
    for groups in stages:
        x = jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True, axis_index_groups=groups)
    return x


_gather = jax.custom_vjp(_gathered, nondiff_argnums=(1, 2))
_gather.defvjp(lambda x, axis, dim: (_gather(x, axis, dim), None), lambda axis, dim, _, dy: (scatter(dy, axis, dim),))


def _stages(axis: str) -> tuple[list[Groups] | list[None], Groups]:
    """Return the groups of the stages of a scatter: a list of stages inside slices, and the groups between slices.

    A stage of None is over all devices at once; the groups between slices are empty if there is only one slice.
    """
    devices, slices = axis_size(axis), slices_along(axis)
    here, sizes = devices // slices, jax.sharding.get_abstract_mesh().shape
    alone = devices == math.prod(size for name, size in sizes.items() if name != "data")
    near = max(n for n in range(1, math.isqrt(here) + 1) if here % n == 0) if platform() == "tpu" and alone else 1
    if slices == near == 1:
        return [None], []
    places = np.arange(devices).reshape(slices, here // near, near)
    far, neighbours, between = (np.moveaxis(places, i, -1).reshape(-1, places.shape[i]).tolist() for i in (1, 2, 0))
    return [groups for groups in (far, neighbours) if len(groups[0]) > 1], between if slices > 1 else []
