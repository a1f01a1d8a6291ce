"""Routing drift: how the routing of a model with adapters differs from that of its base model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import PyTreeDef

from moe_train.evaluate.loss import batch_sums
from moe_train.model.moe.drift import changed_assignments
from moe_train.model.parameters import Parameters, combine, with_expert_ids, without_adapters
from moe_train.train.objectives.objective import DRIFT_METRIC, Metric, ModelWeights, Objective, objective_inputs


class Drift(NamedTuple):
    """How to compare the routing of a model with adapters with that of its base model."""

    sums: DriftFunction
    """The compiled function from `make_drift_sums`."""
    base_weights: Parameters
    """The base model's weights of the modules that are trained in full in addition to the adapters."""
    batches: int
    """Number of batches to compare, from the first; each takes a second forward pass."""


class DriftSums(NamedTuple):
    """Counts over one or more batches; L is the number of sparse layers, E of experts."""

    changed_L: jax.Array | np.ndarray
    """Number of assignments to experts that the base model does not select for the token."""
    load_LE: jax.Array | np.ndarray
    """Number of assignments to each expert."""
    assignments: jax.Array | np.ndarray
    """Number of assignments in one layer."""


DriftFunction = Callable[[Parameters, Parameters, Any, Parameters], tuple[DriftSums, dict[str, Metric]]]
"""A function (trained weights, frozen weights, batch, base weights of what is trained) -> (counts, metrics of the batch)."""


def make_drift_sums(structure: PyTreeDef, objective: Objective) -> DriftFunction:
    """Compile `drift_sums` for a model, once for all evaluations of a run."""
    return jax.jit(partial(drift_sums, structure=with_expert_ids(structure), objective=objective))


def drift_sums(
    params: Parameters, frozen: Parameters, batch: Any, base_weights: Parameters, structure: PyTreeDef, objective: Objective
) -> tuple[DriftSums, dict[str, Metric]]:
    """Count the assignments of a batch that differ from the base model's.

    Args:
        params: The trained weights.
        frozen: The frozen weights.
        batch: The batch.
        base_weights: The base model's weights of the modules that are trained in full.
        structure: The structure of a model that returns expert ids (see `with_expert_ids`).
        objective: The objective.

    Returns:
        The counts, and the objective's metrics of the batch.
    """
    inputs = objective_inputs(objective, structure, ModelWeights(params, frozen, base_weights), batch)
    metrics, routers = batch_sums(objective, inputs)
    base_model = combine(without_adapters(structure), base_weights, frozen)
    _, base_routers = batch_sums(objective, inputs._replace(model=base_model))
    assert routers is not None and base_routers is not None  # drift is measured for sparse models only
    ids_LBTA = routers.expert_ids
    base_ids_LBTA = base_routers.expert_ids
    assert ids_LBTA is not None and base_ids_LBTA is not None  # the structure is one of `with_expert_ids`
    # Segment 0 is padding, which is neither routed nor counted.
    counts = changed_assignments(ids_LBTA, base_ids_LBTA, batch.segment_ids != 0)
    # An objective with a reference reports the drift itself, of batches whose models keep the chosen experts.
    metrics.pop(DRIFT_METRIC, None)
    return DriftSums(counts.changed_L, routers.chosen_E, counts.assignments), metrics


def drift_metrics(counts: Sequence[DriftSums]) -> dict[str, list[float]]:
    """Return the share of changed assignments and of dead experts in each sparse layer, over all batches; {} without batches."""
    if not counts:
        return {}
    sums = jax.tree.map(lambda *xs: np.sum(xs, axis=0, dtype=np.float64), *jax.device_get(counts))
    share_LE = sums.load_LE / sums.assignments
    return {
        DRIFT_METRIC: (sums.changed_L / sums.assignments).tolist(),
        "dead_experts": np.mean(share_LE < 0.01 / share_LE.shape[1], axis=1).tolist(),
    }
