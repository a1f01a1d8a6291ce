"""How the routing of a model with adapters differs from that of its base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_train.evaluate.loss import batch_sums
from moe_train.model.parameters import Parameters, combine, with_expert_ids, without_adapters
from moe_train.train.objectives.objective import Metric, Objective, Weights, inputs_of


class Drift(NamedTuple):
    """How the routing of a model with adapters is compared with that of its base."""

    sums: DriftFunction
    """What `make_drift_sums` made."""
    originals: Parameters
    """The base's weights of what is trained in full beside the adapters."""
    batches: int
    """The first ones, each with a second forward pass."""


class DriftSums(NamedTuple):
    """Counts of one batch, or of several."""

    changed_L: Any
    """Assignments to experts that the base does not choose for the token."""
    load_LE: Any
    """Assignments to each expert."""
    assignments: Any
    """Of one layer."""


DriftFunction = Callable[[Parameters, Parameters, Any, Parameters], tuple[DriftSums, dict[str, Metric]]]
"""(learned weights, frozen weights, batch, base weights of what is trained) -> (counts, metrics of the batch)."""


def make_drift_sums(structure: Any, objective: Objective) -> DriftFunction:
    """`drift_sums` of a model's structure, compiled once for all evaluations of a run."""
    return jax.jit(partial(drift_sums, structure=with_expert_ids(structure), objective=objective))


def drift_sums(
    learned: Parameters, frozen: Parameters, batch: Any, originals: Parameters, structure: Any, objective: Objective
) -> tuple[DriftSums, dict[str, Metric]]:
    """Count the assignments of a batch that differ from the base model's; with the objective's metrics of the batch.

    structure: of a model that keeps the experts' ids.
    """
    inputs = inputs_of(objective, structure, Weights(learned, frozen, originals), batch)
    metrics, routers = batch_sums(objective, inputs)
    base_model = combine(without_adapters(structure), originals, frozen)
    _, base = batch_sums(objective, inputs._replace(model=base_model))
    assert routers is not None and base is not None and routers.expert_ids is not None and base.expert_ids is not None
    ids_LBTA, base_LBTA = routers.expert_ids, base.expert_ids
    kept_LBTA = jnp.any(ids_LBTA[..., :, None] == base_LBTA[..., None, :], axis=-1)
    valid_BT = batch.segment_ids != 0
    assignments = jnp.sum(valid_BT) * ids_LBTA.shape[-1]
    changed_L = jnp.sum(~kept_LBTA & valid_BT[None, ..., None], axis=(1, 2, 3))
    return DriftSums(changed_L, routers.chosen_E, assignments), metrics


def drift_metrics(drifted: Sequence[DriftSums]) -> dict[str, Any]:
    """The share of changed assignments and of dead experts in each sparse layer, over the batches; {} without any."""
    if not drifted:
        return {}
    sums = jax.tree.map(lambda *xs: np.sum(xs, axis=0, dtype=np.float64), *jax.device_get(drifted))
    share_LE = sums.load_LE / sums.assignments
    return {
        "routing_drift": (sums.changed_L / sums.assignments).tolist(),
        "dead_experts": np.mean(share_LE < 0.01 / share_LE.shape[1], axis=1).tolist(),
    }
