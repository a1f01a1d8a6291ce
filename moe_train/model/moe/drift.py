"""Routing drift: assignments to experts that another model does not select for the token."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class ChangedAssignments(NamedTuple):
    """Counts over a batch; L is the number of sparse layers."""

    changed_L: Int[Array, " L"]
    """Number of assignments of each layer to experts that the base model does not select for the token."""
    assignments: Int[Array, ""]
    """Number of assignments in one layer."""


def changed_assignments(
    ids_LBTA: Int[Array, "L B T A"], base_ids_LBTA: Int[Array, "L B T A"], valid_BT: Bool[Array, "B T"]
) -> ChangedAssignments:
    """Count the assignments that differ from a base model's.

    The order of a token's experts does not matter: an assignment is kept if the base model selects the expert in any place.

    Args:
        ids_LBTA: experts that the model chooses.
        base_ids_LBTA: experts that the base model chooses.
        valid_BT: False for positions that are not counted, such as padding, which is not routed.
    """
    kept_LBTA = jnp.any(ids_LBTA[..., :, None] == base_ids_LBTA[..., None, :], axis=-1)
    changed_L = jnp.sum(~kept_LBTA & valid_BT[None, ..., None], axis=(1, 2, 3), dtype=jnp.int32)
    return ChangedAssignments(changed_L, jnp.sum(valid_BT, dtype=jnp.int32) * ids_LBTA.shape[-1])


def experts_by_position(ids_LBTA: Int[Array, "L B T A"]) -> Int[Array, "B T X"]:
    """Return the experts of all layers at each position side by side, as they are stored."""
    L, B, T, A = ids_LBTA.shape
    return ids_LBTA.transpose(1, 2, 0, 3).reshape(B, T, L * A)


def experts_by_layer(ids_BTX: Int[Array, "B T X"], experts_per_token: int) -> Int[Array, "L B T A"]:
    """Undo `experts_by_position`."""
    B, T, X = ids_BTX.shape
    return ids_BTX.reshape(B, T, X // experts_per_token, experts_per_token).transpose(2, 0, 1, 3)
