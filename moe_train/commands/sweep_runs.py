"""Train the runs of a sweep, and compare what they reached."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from moe_train.commands.evaluate_suite import Comparisons, evaluate_suites
from moe_train.commands.runs import rows_of, summarize_runs
from moe_train.commands.sweep import SweptRun
from moe_train.machine.files import JsonObject
from moe_train.machine.mesh import join_processes
from moe_train.run import loop
from moe_train.run.resolve import resolve

log = logging.getLogger(__name__)


def train_runs(runs: Sequence[SweptRun]) -> int:
    """Train runs one after the other, and return the exit code: that of the first run that did not finish, or 0.

    All configs are resolved before the first run starts, so that a mistake in the last of them is found at once.
    """
    join_processes()
    resolved = [resolve(run.config, jax.device_count()) for run in runs]
    for number, run in enumerate(resolved, start=1):
        if jax.process_index() == 0:
            log.info("run %d of %d: %s", number, len(resolved), run.run_dir)
        code = loop.train_run(run)
        if code != loop.FINISHED:
            return code
    return loop.FINISHED


def compare_runs(runs: Sequence[SweptRun], suites: Sequence[Path]) -> tuple[list[dict[str, Any]], JsonObject]:
    """Return the table of the runs, and their comparison with the first one on suites, item by item (empty without suites).

    Each run is represented by its best checkpoint if it has one, otherwise by its newest.
    """
    summaries = summarize_runs([Path(run.config.run_dir) for run in runs])
    table = rows_of(summaries)
    if not suites:
        return table, {}
    named = []
    for summary in summaries:
        has_best = summary.figures.get("best_checkpoint") is not None
        named.append(Path(f"{summary.run}@best" if has_best else summary.run))
    first, *others = named
    result = evaluate_suites(first, suites, Comparisons(others))
    return table, {"suites": result["suites"], "comparisons": [_seen_from_other(row, str(first)) for row in result["comparisons"]]}


def _seen_from_other(row: JsonObject, first: str) -> JsonObject:
    """Return the comparison of the first run with another one as that of the other with the first."""
    opposite = {"better": "worse", "worse": "better", "tied": "tied"}
    return {
        "suite": row["suite"],
        "run": row["against"],
        "against": first,
        "old": row["new"],
        "new": row["old"],
        "difference": 0.0 - row["difference"],  # without a minus sign for 0
        "low": 0.0 - row["high"],
        "high": 0.0 - row["low"],
        "not_graded": row["not_graded"],
        "p_value": row["p_value"],
        "verdict": opposite[row["verdict"]],
        "method": row["method"],
    }
