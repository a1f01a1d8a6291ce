"""Write the metrics of a run to the terminal, to `metrics.jsonl`, as TensorBoard events and to trackers."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich.console import Console

from moe_train import config
from moe_train.machine.files import write_bytes
from moe_train.machine.progress import Progress
from moe_train.machine.progress_bar import ProgressBar
from moe_train.run.tensorboard import EventWriter
from moe_train.run.trackers.trackers import Trackers

log = logging.getLogger(__name__)

LINE_SECONDS = 5.0
"""Seconds between two lines of metrics if stderr is not a terminal."""
KINDS = ("train", "eval", "suite")
"""Kinds of lines of metrics.jsonl: a training step, the held-out loss, and scores on suites."""
MetricsRecord = dict[str, Any]
"""A line of metrics.jsonl: `kind` ("train", "eval" or "suite"), `step`, and the metrics by name; None for values that are not
finite.
"""


class Writer:
    """Write the metrics of a run to all destinations; processes other than the first write nothing.

    `metrics.jsonl` has one object per line with `step` (steps tried so far) and `kind` ("train", "eval" or "suite"). Lines past
    `start_step`, left by a process that died after its last checkpoint, are removed, since those steps are done again.

    Args:
        run_dir: folder for `metrics.jsonl` and `tensorboard/`.
        settings: whether TensorBoard events are written.
        start_step: the step that the run continues after; 0 for a new run.
        total_steps: optimizer steps of the whole run.
        write: whether this process writes.
        trackers: receive the metrics too; None without any.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: config.Metrics,
        *,
        start_step: int,
        total_steps: int,
        write: bool = True,
        trackers: Trackers | None = None,
    ):
        self._write = write
        self._new_records: list[MetricsRecord] = []
        self.is_finished = False
        """Whether all steps of the run are done, for trackers."""
        self._trackers = trackers
        if not write:
            return
        self._path = run_dir / "metrics.jsonl"
        self._file = _open_lines(self._path, start_step)
        self._events = EventWriter(run_dir, start_step, total_steps) if settings.tensorboard else None
        self._console = Console(stderr=True, highlight=False)
        self._total = total_steps
        self._first: tuple[float, int] | None = None  # (time, step) of the first metrics
        self._last_line_time = 0.0
        self._bar: ProgressBar | None = None
        if self._console.is_terminal:
            self._bar = ProgressBar("training", self._console, keep=True)
            self._bar.show(Progress("", start_step, total_steps, "steps", "first step: compiling"))
            self._bar.start()

    def say(self, text: str) -> None:
        """Print a line for people, above the progress bar."""
        if self._write:
            self._console.print(text, markup=False, soft_wrap=True)

    def train(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of a training step."""
        self._record("train", step, metrics)
        if not self._write:
            return
        line = _line(metrics)
        if self._bar is not None:
            self._bar.show(Progress("", step, self._total, "steps", line))
        else:
            now = time.monotonic()
            self._first = self._first or (now, step)
            # Measured from the first line on, so that compilation does not count.
            since, after = self._first
            if step not in (after, self._total) and now - self._last_line_time < LINE_SECONDS:
                return
            self._last_line_time = now
            remaining = ""
            if step > after:
                seconds_left = (now - since) / (step - after) * (self._total - step)
                remaining = f"  {_duration(seconds_left)} left"
            self.say(f"step {step}/{self._total}  {line}{remaining}")

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of an evaluation after `step`."""
        self._record("eval", step, metrics)
        if self._write:
            drift = metrics.get("routing_drift")
            routing = ""
            if drift:
                routing = (
                    f"; {np.mean(drift):.1%} of routing choices differ from the base model's, at most {max(drift):.1%} in a layer"
                )
            tokens = metrics.get("loss_tokens")  # absent if the objective averages over something other than tokens
            over = "" if tokens is None else f" over {tokens:,} tokens"
            self.say(f"step {step}/{self._total}  held-out loss {metrics['loss']:.4f}{over}{routing}")

    def suites(self, step: int, scores: Mapping[str, float], ungraded: int) -> None:
        """Write the mean score on each suite after `step`, and the number of answers that could not be graded."""
        self._record("suite", step, {**scores, "not_graded": ungraded} if ungraded else scores)
        if self._write:
            figures = "  ".join(f"{name} {score:.4f}" for name, score in scores.items())
            self.say(f"step {step}/{self._total}  suites: {figures}{f'  ({ungraded} answers not graded)' if ungraded else ''}")

    def new_records(self) -> list[MetricsRecord]:
        """Return the records since the last call, in every process."""
        records = self._new_records
        self._new_records = []
        return records

    def _record(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        record = {"kind": kind, "step": step, **_replace_non_finite(metrics)}
        # In every process: `steps` yields the same metrics everywhere.
        self._new_records.append(record)
        if not self._write:
            return
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            # At once, so that a reader sees each step, and a killed process loses none.
            self._file.flush()
        except OSError as error:
            # Python names no file in errors of an open one.
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if self._events is not None:
            self._events.write(kind, step, metrics)
        if self._trackers is not None:
            self._trackers.write(kind, step, metrics)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A full disk must not hide the error that ended the block.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self.close()

    def close(self) -> None:
        """Finish the files; on a terminal, leave the progress bar as it is."""
        if not self._write:
            return
        if self._bar is not None:
            self._bar.stop()
        if self._events is not None:
            self._events.close()
        if self._trackers is not None:
            self._trackers.close(self.is_finished)
        # So that the last lines survive a machine that is shut down right after the run.
        os.fsync(self._file.fileno())
        self._file.close()


def _replace_non_finite(metrics: Any) -> Any:
    """Replace NaN and infinities, which JSON cannot express, by null."""
    if isinstance(metrics, Mapping):
        return {key: _replace_non_finite(value) for key, value in metrics.items()}
    if isinstance(metrics, list):
        return [_replace_non_finite(value) for value in metrics]
    if isinstance(metrics, float) and not math.isfinite(metrics):
        return None
    return metrics


def _open_lines(path: Path, start_step: int) -> TextIO:
    """Open `path` for appending, after removing lines past `start_step`, damaged lines and an incomplete last line.

    With `start_step` 0, a new start, all lines are removed. A warning names each damaged line.
    """
    kept_lines: list[bytes] = []
    if start_step and path.exists():
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            # Cut short by a process that died while writing.
            if not line.endswith(b"\n"):
                continue
            try:
                step = parse_line(line)["step"]
            except ValueError as error:
                log.warning("%s:%d is dropped: %s", path, number, error)
                continue
            if step <= start_step:
                kept_lines.append(line)
    # Replaced atomically, so that a crash here loses no line.
    write_bytes(path, b"".join(kept_lines))
    return path.open("a", encoding="utf-8")


def parse_line(line: bytes) -> MetricsRecord:
    """Parse a line of `metrics.jsonl`. Raises ValueError if it is not the metrics of a step."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {getattr(error, 'msg', error)}") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int) or record.get("kind") not in KINDS:
        raise ValueError("not the metrics of a step (an object with kind and step)")
    return record


def _line(metrics: Mapping[str, Any]) -> str:
    """Format the metrics of a training step as one line."""
    parts = [f"loss {metrics['loss']:.4f}", f"{metrics['tokens_per_second']:,.0f} tokens/s"]
    if metrics.get("mfu") is not None:
        parts.append(f"MFU {metrics['mfu']:.1%}")
    if metrics.get("input_wait", 0) >= 0.01:
        parts.append(f"waiting for input {metrics['input_wait']:.0%}")
    if "balance" in metrics:
        parts.append(f"balance {metrics['balance']:.2f}")
    if any(metrics.get("dropped", ())):
        parts.append(f"{sum(metrics['dropped']):,} dropped")
    if metrics.get("skipped"):
        parts.append(f"{metrics['skipped']} skipped")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
