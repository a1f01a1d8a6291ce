"""Sums of outer products, which are the gradients of weights, in the order of operands that is fast on CPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_train.machine.mesh import platform

NARROW = 4
"""How many times fewer outputs than inputs a weight has whose gradient is computed transposed on CPUs.

XLA multiplies up to eight times faster with the wider operand last (512 and 16 columns of 4096 rows, on a Zen 4). It pays for
the transposition of a gradient that is small, as that of an adapter's first factor.
"""


def is_faster_transposed(inputs: int, outputs: int) -> bool:
    """Return whether the gradient of a weight (inputs, outputs) should be computed as that of its transpose."""
    return platform() == "cpu" and NARROW * outputs <= inputs


def sum_of_outer_products(x_RI: Float[Array, "R I"], dy_RO: Float[Array, "R O"]) -> Float[Array, "I O"]:
    """Compute the sum of the outer products of the rows of x and dy."""
    if is_faster_transposed(x_RI.shape[1], dy_RO.shape[1]):
        # The barrier keeps XLA from swapping the operands back.
        return jax.lax.optimization_barrier(jnp.einsum("RO,RI->OI", dy_RO, x_RI)).T
    return jnp.einsum("RI,RO->IO", x_RI, dy_RO)
