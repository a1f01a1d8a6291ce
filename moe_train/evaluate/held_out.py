"""The metrics of an objective on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable
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


class EvaluationStopped(Exception):
    """An evaluation was stopped between two batches, in all processes."""


def evaluate_held_out(
    sums: BatchSums,
    params: Parameters,
    frozen: Parameters,
    loader: Loader,
    mesh: Mesh,
    batches: int | None = None,
    drift: Drift | None = None,
    is_stopped: Callable[[], bool] | None = None,
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
        is_stopped: Asked before each batch whether to stop; all processes must get the same answer. None never to stop.

    Returns:
        The metrics: `loss` and those that the objective names. With `drift` also `routing_drift[l]`, the share of layer l's
        assignments that differ from the base model's, and `dead_experts[l]`, the share of experts that got less than 1% of an
        even share.

    Raises:
        EvaluationStopped: `is_stopped` returned True.
    """
    assert loader.batches is not None  # only the training loader is endless
    num_batches = loader.batches if batches is None else min(batches, loader.batches)
    drift_sums: list[DriftSums] = []

    def dispatch(i: int) -> dict[str, Metric]:
        """Start the computation on batch i, which the device does asynchronously."""
        batch = put_batch(loader.batch(i), mesh)
        if drift is None or i >= drift.batches:
            return sums(params, frozen, batch)
        counts, metrics = drift.sums(params, frozen, batch, drift.base_weights)
        drift_sums.append(counts)
        return metrics

    totals: dict[str, Metric] | None = None
    in_progress = dispatch(0)  # a loader has at least one row
    for i in range(1, num_batches):
        if is_stopped is not None and is_stopped():
            raise EvaluationStopped
        # The next batch is dispatched before the previous one is read, so that the device stays busy.
        dispatched = dispatch(i)
        totals = _add(totals, in_progress)
        in_progress = dispatched
    totals = _add(totals, in_progress)
    return {**{name: _value(metric) for name, metric in totals.items()}, **drift_metrics(drift_sums)}


def _add(totals: dict[str, Metric] | None, metrics: dict[str, Metric]) -> dict[str, Metric]:
    """Add a batch's sums as Python numbers, which stay exact over many batches; arrays, such as counts by layer, in 64 bits."""
    numbers = jax.tree.map(_exact, jax.device_get(metrics))
    if totals is None:
        return numbers
    return jax.tree.map(lambda a, b: a + b, totals, numbers)


def _exact(x: Any) -> Any:
    """Return a sum in a type that does not round or overflow."""
    array = np.asarray(x)
    if array.ndim == 0:
        return array.item()
    return array.astype(np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64)


def _value(metric: Metric) -> Any:
    """Return the value of a metric: a mean divided by its weight (NaN if the weight is 0), anything else as it is."""
    if not isinstance(metric, Mean):
        return metric
    mean = metric.sum / metric.weight if metric.weight else math.nan
    return mean.tolist() if isinstance(mean, np.ndarray) else mean
