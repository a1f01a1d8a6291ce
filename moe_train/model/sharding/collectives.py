"""Inside `shard_map`: parts of an array gathered along a mesh axis, and sums scattered back; each is the other's gradient.

Bytes are all that both are chosen by. Asked for a reduce-scatter, XLA:TPU (libtpu of JAX 0.10) sums the whole array on each
device, which doubles what a device receives,
- along an axis that all devices of a slice lie on; of 64 and more it gathers by such a sum, too. In two stages, of devices
  far apart and of neighbours, it scatters, and as many bytes move as in one;
- inside each slice, where an axis goes over several: it scatters between slices alone. So stages are first inside a slice,
  then between slices, which a part crosses that is as small as can be. A gather it takes in that order, reversed, itself;
- where a device keeps no more than 128 entries, the lanes of a register, of the dim that lies along them; over several
  slices, however many. So such a dim changes places with the one before, and the small part that is kept changes back.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from moe_train.machine.mesh import axis_size, platform, slices_along

LANES = 128

Groups = list[list[int]]
"""Places along an axis that send to each other."""


def gather(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """x's parts along a mesh axis, concatenated on `dim`.

    An axis of one device is passed over: XLA would keep the collective, and lay the weight out for it.
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
    """The sum of all x along a mesh axis, of which each device keeps its part of `dim`."""
    devices = axis_size(axis)
    if devices == 1:
        return x
    inside, between = _stages(axis)
    if platform() == "tpu" and 0 < dim == x.ndim - 1 and (between or x.shape[dim] // devices <= LANES):
        rows = jnp.swapaxes(x, dim - 1, dim)
        # said of memory too, since it would be undone there
        rows = with_layout_constraint(rows, Layout(tuple(range(rows.ndim))))
        return jnp.swapaxes(scatter(rows, axis, dim - 1), dim - 1, dim)
    if x.shape[0] == 1 and dim > 0:  # one expert a device: that dim, too, makes XLA:TPU sum the whole
        return scatter(x[0], axis, dim - 1)[None]
    if between:  # devices of a slice keep neighbouring parts: of each slice's part their own, then that of their slice
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
    """Who sends to whom in a scatter: in each stage inside slices (None is all to all), and then between slices, if any."""
    devices, slices = axis_size(axis), slices_along(axis)
    here, sizes = devices // slices, jax.sharding.get_abstract_mesh().shape
    alone = devices == math.prod(size for name, size in sizes.items() if name != "data")
    near = max(n for n in range(1, math.isqrt(here) + 1) if here % n == 0) if platform() == "tpu" and alone else 1
    if slices == near == 1:
        return [None], []
    places = np.arange(devices).reshape(slices, here // near, near)
    far, neighbours, between = (np.moveaxis(places, i, -1).reshape(-1, places.shape[i]).tolist() for i in (1, 2, 0))
    return [groups for groups in (far, neighbours) if len(groups[0]) > 1], between if slices > 1 else []
