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
from jaxtyping import Array, Int, Shaped

from moe_train.machine.mesh import axis_size, platform, slices_along

LANES = 128
"""Lanes of a TPU register."""

AxisGroups = list[list[int]]
"""Groups of positions along an axis; the devices of a group send to each other."""


def gather_axis(x: Shaped[Array, "..."], axis: str, dim: int) -> Shaped[Array, "..."]:
    """Concatenate the parts of x along a mesh axis on dim `dim`.

    An axis of one device is skipped: XLA would keep the collective and change the weight's layout for it.

    Args:
        x: this device's part.
        axis: mesh axis.
        dim: dim of x that `axis` splits.
    """
    if axis_size(axis) == 1:
        return x
    # Only floats have a gradient, and so need the rule of `_differentiable_gather`.
    gather = _differentiable_gather if jnp.issubdtype(x.dtype, jnp.floating) else _gather
    return gather(x, axis, dim)


def _gather(x: Shaped[Array, "..."], axis: str, dim: int) -> Shaped[Array, "..."]:
    inside, between = _stages(axis)
    if platform() in ("gpu", "cuda") and dim > 0:
        # XLA:GPU gathers along the outermost dim in memory. Without the constraint it lays out the weights of all layers so, in a
        # second copy of them before the loop over layers; with it, the part of one layer at a time.
        x = with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    # The reverse of a scatter's stages, whose gradient it is.
    # Over several slices a single stage will do: XLA itself gathers between slices first.
    stages = [None] if between else inside[::-1]
    for groups in stages:
        x = jax.lax.all_gather(x, axis, axis=dim, tiled=True, axis_index_groups=groups)
    return x


def reduce_scatter_axis(x: Shaped[Array, "..."], axis: str, dim: int) -> Shaped[Array, "..."]:
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
        return jnp.swapaxes(reduce_scatter_axis(rows, axis, dim - 1), dim - 1, dim)
    # A first dim of size 1 (one expert per device) also makes XLA:TPU all-reduce the whole array.
    if x.shape[0] == 1 and dim > 0:
        return reduce_scatter_axis(x[0], axis, dim - 1)[None]
    # Devices of a slice keep neighbouring parts: first each device's part of every slice's part, then the part of its own slice.
    if between:
        lead, tail = x.shape[:dim], x.shape[dim + 1 :]
        x = _reduce_scatter(x.reshape(*lead, len(between[0]), -1, *tail), axis, dim + 1, inside)
        return _reduce_scatter(x, axis, dim, [between]).reshape(*lead, -1, *tail)
    return _reduce_scatter(x, axis, dim, inside)


def _reduce_scatter(x: Shaped[Array, "..."], axis: str, dim: int, stages: list[AxisGroups] | list[None]) -> Shaped[Array, "..."]:
    for groups in stages:
        x = jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True, axis_index_groups=groups)
    return x


_differentiable_gather = jax.custom_vjp(_gather, nondiff_argnums=(1, 2))
_differentiable_gather.defvjp(
    lambda x, axis, dim: (_differentiable_gather(x, axis, dim), None),
    lambda axis, dim, _, dy: (reduce_scatter_axis(dy, axis, dim),),
)


def _stages(axis: str) -> tuple[list[AxisGroups] | list[None], AxisGroups]:
    """Return the groups of the stages of a scatter: a list of stages inside slices, and the groups between slices.

    A stage of None is over all devices at once; the groups between slices are empty if there is only one slice.
    """
    devices = axis_size(axis)
    slices = slices_along(axis)
    per_slice = devices // slices
    mesh_sizes = jax.sharding.get_abstract_mesh().shape
    is_only_axis = devices == math.prod(size for name, size in mesh_sizes.items() if name != "data")
    near = 1
    if platform() == "tpu" and is_only_axis:
        # The largest divisor up to the square root: two stages of about equal size.
        near = max(n for n in range(1, math.isqrt(per_slice) + 1) if per_slice % n == 0)
    if slices == near == 1:
        return [None], []
    # Positions along the axis as (slice, group of neighbours, neighbour); a stage's groups vary one of these indices.
    positions = np.arange(devices).reshape(slices, per_slice // near, near)
    stages = [_groups_along(positions, dim) for dim in (1, 2)]
    between = _groups_along(positions, 0) if slices > 1 else []
    return [groups for groups in stages if len(groups[0]) > 1], between


def _groups_along(positions: Int[np.ndarray, "S G N"], dim: int) -> AxisGroups:
    """Return the groups whose positions differ in one index only, that of `dim`."""
    return np.moveaxis(positions, dim, -1).reshape(-1, positions.shape[dim]).tolist()
