"""Partition specs of weights and activations, and sums over replicas."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from moe_train.machine.mesh import axis_size, batch_axes, global_axes

ACTIVATION = {"T": "context", "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}
"""The mesh axes of an activation's dims, by their letter; B is over `batch_axes()`, others are whole on each device."""


SPLIT = ("tensor", "expert")


def spec_of(x: jax.Array) -> P:
    """The partition spec that an array carries in its type."""
    return jax.typeof(x).sharding.spec


def activation_spec(letters: str) -> P:
    """`"BTNH"` -> the spec of such an activation."""
    return P(*(batch_axes() if letter == "B" else ACTIVATION.get(letter) for letter in letters))


def without_fsdp(spec: P) -> P:
    """The spec of a weight that is gathered over `fsdp`."""
    return P(*(None if entry == "fsdp" else entry for entry in spec))


def split(size: int) -> str | tuple[str, str]:
    """The axes of a weight's N, K or V, where every token meets that weight: `tensor`, and `expert` too where it
    divides them, which has no other use here. D is split over `fsdp` alone: over both, its parts would be narrower
    than the 128 lanes of a TPU."""
    return SPLIT if size % (axis_size("tensor") * axis_size("expert")) == 0 else "tensor"


def gathered(spec: P) -> P:
    """The spec of a weight of `project` at its use."""
    return P(*({"fsdp": None, SPLIT: "tensor"}.get(entry, entry) for entry in spec))


def replicas() -> tuple[int, jax.Array | int]:
    """(number of replicas, this one's) where each works for itself (`train.step`); otherwise arrays are of all: (1, 0)."""
    return (1, 0) if "data" in global_axes() else (axis_size("data"), jax.lax.axis_index("data"))


@jax.custom_vjp
def over_replicas(x: Any) -> Any:
    """The sum over replicas of what one has summed over its own tokens; global view. All replicas use the sum alike, so
    that the gradient of each one's part is the sum's."""
    return x if "data" in global_axes() else jax.lax.psum(x, "data")


over_replicas.defvjp(lambda x: (over_replicas(x), None), lambda _, dx: (dx,))
