"""Partition specs of weights and activations, and sums over replicas."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Shaped

from moe_train.machine.mesh import axis_size, batch_axes, global_axes, is_one_device

ACTIVATION = {"T": "context", "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}
"""Mesh axis of each activation dim, by its letter; B is split over `batch_axes()`, all other dims are not split."""

TENSOR_AND_EXPERT = ("tensor", "expert")
"""The two axes that together split N, K or V of a weight if they divide it (see `split_axes`)."""


def spec_of(x: Shaped[Array, "..."]) -> P:
    """Return the partition spec that an array carries in its type."""
    return jax.typeof(x).sharding.spec


def activation_spec(letters: str) -> P:
    """Return the partition spec of an activation with these dims, such as `"BTNH"`."""
    return P(*(batch_axes() if letter == "B" else ACTIVATION.get(letter) for letter in letters))


def place(x: Any, letters: str) -> Shaped[Array, "..."]:
    """Return an activation, which may be a NumPy array or an array of any sharding, with the spec of its dims.

    Args:
        x: the array.
        letters: its dims, such as `"BT"`; see `activation_spec`.
    """
    array = jnp.asarray(x)
    spec = activation_spec(letters)
    return array if spec_of(array) == spec else jax.sharding.reshard(array, spec)


def plain_on_one_device(tree: Any) -> Any:
    """Return arrays without mesh axes in their types if the mesh has one device; on other meshes return them unchanged.

    JAX refuses to guess the sharding of an indexing operation, such as `jnp.take_along_axis`, if the operand's type names mesh
    axes, even axes of one device. Nothing is moved.
    """
    if not is_one_device():
        return tree
    return jax.tree.map(lambda x: jax.sharding.reshard(x, P(*(None,) * x.ndim)), tree)


def without_fsdp(spec: P) -> P:
    """Return the spec of a weight after it is gathered over `fsdp`."""
    return P(*(None if entry == "fsdp" else entry for entry in spec))


def split_axes(size: int) -> str | tuple[str, str]:
    """Return the mesh axes that split dim N, K or V of a weight that every token uses.

    The result is `tensor`, and also `expert`, which has no other use here, if both together divide the size. D is split over
    `fsdp` only: over `fsdp` and `expert` its parts would be narrower than the 128 lanes of a TPU.
    """
    return TENSOR_AND_EXPERT if size % (axis_size("tensor") * axis_size("expert")) == 0 else "tensor"


def fsdp_axis(size: int) -> str | None:
    """Return `fsdp` to split a dim of this size, the rank of a latent; None if `fsdp` does not divide it."""
    return "fsdp" if size % axis_size("fsdp") == 0 else None


def gathered_spec(spec: P) -> P:
    """Return the spec of a weight after it is gathered for a product: over `fsdp`, and over `expert` where that splits it."""
    gathered = {"fsdp": None, TENSOR_AND_EXPERT: "tensor"}
    return P(*(gathered.get(entry, entry) for entry in spec))


def replicas() -> tuple[int, Int[Array, ""] | int]:
    """Return (number of replicas, index of this one) if each replica computes on its own (`train.step`), otherwise (1, 0).

    With (1, 0) arrays hold the tokens of all replicas.
    """
    if "data" in global_axes():
        return 1, 0
    return axis_size("data"), jax.lax.axis_index("data")


@jax.custom_vjp
def sum_over_replicas(x: Any) -> Any:
    """Sum over replicas what each has summed over its own tokens. Global view.

    The sum is used identically on every replica, so its gradient passes through unchanged. If arrays hold the tokens of all
    replicas, x is returned unchanged.
    """
    return x if "data" in global_axes() else jax.lax.psum(x, "data")


sum_over_replicas.defvjp(lambda x: (sum_over_replicas(x), None), lambda _, dx: (dx,))
