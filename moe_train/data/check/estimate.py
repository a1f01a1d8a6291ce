"""Estimate training from the lengths of examples: distribution, truncation, and the rows, steps and seconds of an epoch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moe_train import config
from moe_train.data.batches import packing
from moe_train.data.check.results import LengthResult, PackedSource, PackingResult, TruncationResult
from moe_train.data.check.sources import CheckedSource
from moe_train.machine.files import read_object

Lengths = Mapping[tuple[int, str], Mapping[int, int]]
"""(source, record kind) -> ids in an example -> number of such examples. An example takes one position less than its ids."""
Fitting = Mapping[tuple[int, str], Mapping[tuple[int, int], int]]
"""(source, record kind) -> (ids in an example, ids of its turns that fit into a row) -> number of such examples. These are
examples of several turns with tools of which only some fit.
"""


def histogram(lengths: Counter[int]) -> LengthResult | None:
    """Summarize the numbers of ids in examples, with bins up to each power of two; None without examples."""
    if not lengths:
        return None
    values = np.array(sorted(lengths))
    counts = np.array([lengths[value] for value in values.tolist()])
    below = np.cumsum(counts)
    total = int(below[-1])

    def quantile(share: float) -> int:
        """Return the length that a share of the examples does not exceed."""
        return int(values[np.searchsorted(below, share * total)])

    # 1 << (value - 1).bit_length() is the smallest power of two that is at least `value`.
    bins = Counter({1 << (value - 1).bit_length(): 0 for value in (int(values[0]), int(values[-1]))})
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        bins[1 << (value - 1).bit_length()] += count
    tops = [1 << k for k in range(min(bins).bit_length() - 1, max(bins).bit_length())]
    return {
        "mean": round(float((values * counts).sum() / total), 1),
        "median": quantile(0.5),
        "p95": quantile(0.95),
        "max": int(values[-1]),
        "histogram": [{"up_to": top, "examples": bins[top]} for top in tops],
    }


def truncation(lengths: Lengths, fitting: Fitting, seq_len: int) -> TruncationResult:
    """Count the examples, and their tokens, that do not fit into one row, and those of which some turns with tools fit."""
    beyond: list[tuple[int, int]] = []  # (positions beyond the row, number of examples)
    for counts in lengths.values():
        beyond += [(ids - 1 - seq_len, count) for ids, count in counts.items() if ids - 1 > seq_len]
    return {
        "seq_len": seq_len,
        "examples_longer": sum(count for _, count in beyond),
        "tokens_beyond": sum(positions * count for positions, count in beyond),
        "examples_with_fitting_turns": sum(sum(counts.values()) for counts in fitting.values()),
    }


def epoch(
    lengths: Lengths,
    fitting: Fitting,
    sources: Sequence[CheckedSource],
    seq_len: int,
    batch_size: int | None,
    tokens_per_second: float | None,
) -> PackingResult:
    """Compute the packing and the length of an epoch with the packer of training.

    Args:
        lengths: The lengths of the examples.
        fitting: Those of them of which only some turns fit into a row.
        sources: The sources, with their weights and their handling of long records.
        seq_len: Positions in a row.
        batch_size: Rows in a batch; None if unknown.
        tokens_per_second: The speed of training; None if unknown.

    Returns:
        Rows, packing efficiency, steps, seconds, and how often each source is seen, in JSON form; an epoch lasts until each row was
        seen once.
    """
    rows = dict.fromkeys(range(len(sources)), 0)
    positions = 0
    for (source, kind), counts in lengths.items():
        too_long = _too_long(sources[source].record, kind)
        row_lengths = Counter({ids - 1: count for ids, count in counts.items()})
        if too_long == "drop":  # training keeps the turns that fit
            for (ids, fitting_ids), count in fitting.get((source, kind), {}).items():
                row_lengths[ids - 1] -= count
                row_lengths[fitting_ids - 1] += count
        num_rows, num_tokens = packing.packed_size(row_lengths, seq_len, too_long)
        rows[source] += num_rows
        positions += num_tokens
    total = sum(rows.values())
    times_seen = _times_seen(rows, [source.weight for source in sources])
    rows_seen = math.ceil(sum(rows[source] * times for source, times in times_seen.items()))
    steps: int | None = None
    if batch_size is not None:
        steps = -(-rows_seen // batch_size)
        rows_seen = steps * batch_size  # only full batches are trained on
    seconds: float | None = None
    if tokens_per_second is not None:
        # `bench` counts all positions of a row, filled or not.
        seconds = rows_seen * seq_len / tokens_per_second
    packed_sources: list[PackedSource] = []
    for source, times in times_seen.items():
        packed_sources.append({"files": list(sources[source].files), "rows": rows[source], "times_seen": round(times, 2)})
    return {
        "rows": total,
        "efficiency": round(positions / (total * seq_len), 4) if total else None,
        "batch_size": batch_size,
        "steps_per_epoch": steps,
        "seconds_per_epoch": seconds,
        "sources": packed_sources,
    }


def _too_long(record: config.Record | None, kind: str) -> packing.TooLong:
    """Return how training would treat long records, given their section or, if it is unknown, their kind."""
    if record is None:
        return "split" if kind == "text" else "drop"
    # Training would stop at a record that is too long; the estimate is for training without it.
    if record.too_long == "error":
        return "drop"
    return record.too_long


def _times_seen(rows: Mapping[int, int], weights: Sequence[float | None]) -> dict[int, float]:
    """Return how often the rows of each source are seen in an epoch, which lasts until each row was seen once."""
    used = [source for source, count in rows.items() if count]
    shares: dict[int, float] = {}
    for source in used:
        weight = weights[source]
        if weight is not None:
            shares[source] = weight
    # Without weights, sources are concatenated; with one source, its weight has no effect.
    if len(used) < 2 or len(shares) < len(used):
        return dict.fromkeys(used, 1.0)
    # Rows are drawn by the sources' weights, so an epoch lasts until the slowest source has been seen once.
    longest = max(rows[source] / shares[source] for source in used)
    return {source: longest * shares[source] / rows[source] for source in used}


def tokens_per_second(bench: Path | None) -> float | None:
    """Read the speed of training from the output of `bench --json`; None if no file is named.

    Raises:
        ValueError: If the file states no speed.
    """
    if bench is None:
        return None
    speed = read_object(bench).get("tokens_per_second")
    if not isinstance(speed, int | float) or speed <= 0:
        raise ValueError(f"{bench} has no tokens_per_second; write it with: moe-train bench CONFIG --json > {bench}")
    return float(speed)
