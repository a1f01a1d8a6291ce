"""Inside `shard_map`: parts of an array gathered along a mesh axis, and sums scattered back; each is the other's gradient.

Bytes are all that both are chosen by. Asked for a reduce-scatter, XLA:TPU (libtpu of JAX 0.10) sums the whole array on each
device, which doubles what a device receives,
- along an axis that all devices of a slice lie on; of 64 and more it gathers by such a sum, too. In two stages, of devices
  far apart and of neighbours, it scatters, and as many bytes move as in one;
- where a device keeps no more than 128 entries, the lanes of a register, of the dim that lies along them. So such a dim
  changes places with the one before, and the small part that is kept changes back.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from moe_train.mesh import axis_size, platform, within_slices

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
    for groups in _stages(axis)[::-1]:
        x = jax.lax.all_gather(x, axis, axis=dim, tiled=True, axis_index_groups=groups)
    return x


def scatter(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """The sum of all x along a mesh axis, of which each device keeps its part of `dim`."""
    devices = axis_size(axis)
    if devices == 1:
        return x
    if platform() == "tpu" and 0 < dim == x.ndim - 1 and x.shape[dim] // devices <= LANES:
        rows = jnp.swapaxes(x, dim - 1, dim)
        # said of memory too, since it would be undone there
        rows = with_layout_constraint(rows, Layout(tuple(range(rows.ndim))))
        return jnp.swapaxes(scatter(rows, axis, dim - 1), dim - 1, dim)
    if x.shape[0] == 1 and dim > 0:  # one expert a device: that dim, too, makes XLA:TPU sum the whole
        return scatter(x[0], axis, dim - 1)[None]
    for groups in _stages(axis):
        x = jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True, axis_index_groups=groups)
    return x


_gather = jax.custom_vjp(_gathered, nondiff_argnums=(1, 2))
_gather.defvjp(lambda x, axis, dim: (_gather(x, axis, dim), None), lambda axis, dim, _, dy: (scatter(dy, axis, dim),))


def _stages(axis: str) -> list[Groups] | list[None]:
    """Who sends to whom in each stage of a scatter; None is all to all. Between slices a part has to be small before it
    crosses, which the compiler sees to where it is not told."""
    devices, sizes = axis_size(axis), jax.sharding.get_abstract_mesh().shape
    alone = devices == math.prod(size for name, size in sizes.items() if name != "data")
    near = max(n for n in range(1, math.isqrt(devices) + 1) if devices % n == 0)
    if platform() != "tpu" or not alone or near == 1 or not within_slices():
        return [None]
    neighbours = [list(range(first, first + near)) for first in range(0, devices, near)]
    return [[list(places) for places in zip(*neighbours, strict=True)], neighbours]
