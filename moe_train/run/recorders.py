"""What records an attempt in the folder of its run: metrics, trackers, the run's log, profiles, and where its time goes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax

from moe_train import config
from moe_train.config import yaml_file
from moe_train.machine.revision import code_revision
from moe_train.run.goodput import Goodput
from moe_train.run.inputs import RunInputs
from moe_train.run.profiling import StepProfiler
from moe_train.run.record import config_sha256, run_log
from moe_train.run.start import Start
from moe_train.run.trackers.trackers import Trackers, tracked_runs
from moe_train.run.writer import Writer


class Recorders(NamedTuple):
    """What records an attempt."""

    writer: Writer
    stopped: SimpleNamespace
    """The last step done and the reason of a stop; see `run_log`."""
    profiler: StepProfiler


@contextlib.contextmanager
def open_recorders(run: config.Run, run_dir: Path, begin: Start, inputs: RunInputs, goodput: Goodput) -> Iterator[Recorders]:
    """Open everything that records an attempt, and close it with the reason why the attempt ends.

    Args:
        run: the resolved run.
        run_dir: its folder.
        begin: the state that the attempt starts from.
        inputs: its data.
        goodput: where its time goes, which is recorded too.
    """
    start = int(begin.state.step)
    writes = jax.process_index() == 0
    trackers = _open_trackers(run, run_dir, inputs, is_new=start == 0)
    writer = Writer(run_dir, run.metrics, start_step=start, total_steps=inputs.total_steps, write=writes, trackers=trackers)
    # The writer is the first, so that the reason of a stop is recorded before the metrics are closed.
    with (
        writer,
        run_log(run, run_dir, begin, inputs) as stopped,
        StepProfiler(run.profile, run_dir, inputs.total_steps, writer.say) as profiler,
    ):
        goodput.open(run_dir, start, write=writes)
        try:
            yield Recorders(writer, stopped, profiler)
        except BaseException as error:
            goodput.write(end=type(error).__name__)
            raise
        goodput.write(end=stopped.reason)


def _open_trackers(run: config.Run, run_dir: Path, inputs: RunInputs, is_new: bool) -> Trackers | None:
    """Start the trackers of a run in its first process; None in others and without any."""
    if jax.process_index() or not run.metrics.trackers:
        return None
    settings = yaml_file.flat(run.to_config().model_dump(mode="json"))
    hashes = {
        "config_sha256": config_sha256(run),
        "data_sha256": inputs.train.manifest_hash,
        "data_order_sha256": inputs.train.identity,
        "code_sha256": code_revision().package_sha256,
    }
    return Trackers(tracked_runs(run.metrics.trackers, run_dir, run.name, {**settings, **hashes}, is_new))
