"""The metrics of an objective on held-out data."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moe_train.data.batches.loader import Loader
from moe_train.evaluate.loss import BatchSums
from moe_train.evaluate.routing import Drift, DriftSums, drift_metrics
from moe_train.machine.mesh import put_batch
from moe_train.model.parameters import Parameters
from moe_train.train.objectives.objective import Mean, Metric


def evaluate(
    sums: BatchSums,
    params: Parameters,
    frozen: Parameters,
    loader: Loader,
    mesh: Mesh,
    batches: int | None = None,
    drift: Drift | None = None,
) -> dict[str, Any]:
    """Compute the objective's metrics on held-out batches.

    Args:
        sums: The compiled function from `make_batch_sums`.
        params: The trained weights.
        frozen: The frozen weights.
        loader: The evaluation batches.
        mesh: The device mesh.
        batches: Number of batches to use; None for all.
        drift: How to compare the routing with that of the base model, on the first `drift.batches` batches; None to skip it.

    Returns:
        The metrics: `loss` and those that the objective names. With `drift` also `routing_drift[l]`, the share of layer l's
        assignments that differ from the base model's, and `dead_experts[l]`, the share of experts that got less than 1% of an
        even share.
    """
    assert loader.batches is not None  # an evaluation loader is finite
    totals: dict[str, Metric] | None = None
    previous: dict[str, Metric] | None = None
    drifted: list[DriftSums] = []
    for i in range(loader.batches if batches is None else min(batches, loader.batches)):
        batch = put_batch(loader.batch(i), mesh)
        if drift is not None and i < drift.batches:
            compared, metrics = drift.sums(params, frozen, batch, drift.originals)
            drifted.append(compared)
        else:
            metrics = sums(params, frozen, batch)
        if previous is not None:  # read one batch late, so that the device stays busy
            totals = _add(totals, previous)
        previous = metrics
    assert previous is not None  # a loader has at least one row
    totals = _add(totals, previous)
    return {**{name: _value(metric) for name, metric in totals.items()}, **drift_metrics(drifted)}


def _add(totals: dict[str, Metric] | None, metrics: dict[str, Metric]) -> dict[str, Metric]:
    """Add a batch's sums as Python numbers, which stay exact over many batches."""
    numbers = jax.tree.map(lambda x: np.asarray(x).item(), jax.device_get(metrics))
    return numbers if totals is None else jax.tree.map(lambda a, b: a + b, totals, numbers)


def _value(metric: Metric) -> Any:
    """Return the value of a metric: a mean divided by its weight (NaN if the weight is 0), anything else as it is."""
    if not isinstance(metric, Mean):
        return metric
    return metric.sum / metric.weight if metric.weight else math.nan
