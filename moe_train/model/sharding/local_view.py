"""Functions of each device's own parts of arrays (local view), which on a mesh of one device name no mesh axis.

`jax.shard_map` lets an array vary along every axis that its spec names, even an axis of one device, and the gradients of weights
are then summed over these axes. XLA:CPU copies an array for a sum over one device: 1% of a step in which weights are many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from moe_train.machine.mesh import is_one_device
from moe_train.model.sharding.specs import plain_on_one_device

_Arrays = TypeVar("_Arrays")


def in_local_view(local: Callable[..., Any], in_specs: Any, out_specs: Any, check_vma: bool = True) -> Callable[..., Any]:
    """Return a function of global arrays that applies `local` to each device's parts, as `jax.shard_map` does.

    Args:
        local: function of the parts; it calls `vary`, `sum_along` and `index_along` in place of JAX's `pcast`, `psum` and
            `axis_index`.
        in_specs: specs of the arguments.
        out_specs: specs of the results.
        check_vma: as in `jax.shard_map`.
    """
    # Without the check gradients are summed over the axes that a spec does not name, which would be all of them.
    if not is_one_device() or not check_vma:
        return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    run = jax.shard_map(local, in_specs=P(), out_specs=P())

    def on_one_device(*arguments: Any) -> Any:
        results = run(*plain_on_one_device(arguments))
        return jax.tree.map(_with_spec, out_specs, results, is_leaf=lambda spec: isinstance(spec, P))

    return on_one_device


def _with_spec(spec: P, results: Any) -> Any:
    """Name the mesh axes of a spec in the types of all results that it is for."""
    return jax.tree.map(lambda x: jax.sharding.reshard(x, spec), results)


def vary(arrays: _Arrays, axes: str | tuple[str, ...]) -> _Arrays:
    """Let arrays vary along mesh axes, so that their gradients are summed over them. Local view."""
    return arrays if is_one_device() else jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), arrays)


def sum_along(arrays: _Arrays, axes: str | tuple[str, ...]) -> _Arrays:
    """Sum arrays over the devices along mesh axes. Local view."""
    return arrays if is_one_device() else jax.lax.psum(arrays, axes)


def index_along(axis: str) -> Int[Array, ""] | int:
    """Return the index of this device along a mesh axis. Local view."""
    return 0 if is_one_device() else jax.lax.axis_index(axis)
