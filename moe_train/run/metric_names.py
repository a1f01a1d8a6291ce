"""Groups of metrics, such as `router/entropy`, under which TensorBoard and trackers show them together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

_GROUPS = {
    "router": (
        "load_balance_loss",
        "router_z_loss",
        "router_entropy",
        "routing_drift",
        "dead_experts",
        "balance",
        "dropped",
        "load",
    ),
    "optimizer": ("grad_norm", "learning_rate", "skipped", "spikes", "vanished_updates"),
    "speed": ("seconds", "tokens_per_second", "input_wait", "mfu", "goodput"),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}
_KINDS = {"train": "loss", "eval": "held_out", "suite": "suites"}
"""Group of the metrics of each kind of record that have no group of their own."""


def grouped(kind: str, name: str) -> str:
    """Return the name of a metric with its group.

    Args:
        kind: kind of the record: train, eval or suite.
        name: name of the metric in `metrics.jsonl`.
    """
    group = _GROUP_OF.get(name)
    # The router's own name need not be said twice.
    short = name.removeprefix("router_") if group == "router" else name
    if kind == "train" and group is not None:
        return f"{group}/{short}"
    return f"{_KINDS[kind]}/{name}" if kind != "train" or name != "loss" else "loss/train"


def scalars(kind: str, metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (grouped name, number) of the metrics of a step.

    A metric with a value per layer yields its mean, and the smallest and largest value; the load of the experts, with a value per
    layer and expert, yields the smallest and largest share of an even load.
    """
    for name, value in metrics.items():
        if isinstance(value, bool | str) or value is None:
            continue
        if isinstance(value, int | float):
            yield grouped(kind, name), value
            continue
        values = layer_values(value)
        if values is None:
            continue
        title = grouped(kind, name)
        if values.ndim == 1:
            yield title, float(values.mean())
        yield f"{title}/min", float(values.min())
        yield f"{title}/max", float(values.max())


def layer_values(value: Any) -> np.ndarray | None:
    """Return the values of a metric per layer.

    Returns:
        (L,), or (L, E) as multiples of an even share for a metric per layer and expert; None for any other.
    """
    try:
        values = np.asarray(value, np.float64)
    except (TypeError, ValueError):  # such as names, or lists of different lengths
        return None
    if values.size == 0 or values.ndim not in (1, 2):
        return None
    return values * values.shape[1] if values.ndim == 2 else values
