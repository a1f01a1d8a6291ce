"""The training loop: from a resolved run to its last checkpoint."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax

from moe_train import config
from moe_train.checkpoint import manager
from moe_train.machine.mesh import make_mesh, put_batch
from moe_train.machine.processes import UNFINISHED, exit_process
from moe_train.model.moe.transport.choose import check_transport
from moe_train.plan.fits import check_fits
from moe_train.run import introduction
from moe_train.run.folder import RunFolder
from moe_train.run.held_out import HeldOutLoss
from moe_train.run.inputs import open_inputs
from moe_train.run.metrics import MetricsReader
from moe_train.run.record import check_checkpoints_kept, run_log
from moe_train.run.saving import RolledBack, Saving, UnusableCheckpoint
from moe_train.run.self_test import run_self_tests
from moe_train.run.start import starting_state
from moe_train.run.stopping import StopRequest, StopRequested, StopVotes, Votes, signals, vote
from moe_train.run.writer import MetricsRecord, Writer
from moe_train.train.objectives.choose import objective_of
from moe_train.train.objectives.objective import Objective
from moe_train.train.step import StepMetrics, compile_step
from moe_train.train.step_definition import definition_of

FINISHED = 0
"""Exit code of a run that is done; UNFINISHED is the exit code of a run that has to be started again."""


def train_run(run: config.Run, objective: Objective | None = None) -> int:
    """Train a resolved run, continuing from its newest checkpoint if it has one.

        moe_train.train_run(moe_train.resolve(moe_train.load_config("run.yaml")))

    Args:
        run: the resolved run.
        objective: replaces the objective that `run` names, for example by a custom loss (`objectives.custom.custom_objective`).

    Returns:
        FINISHED after the last step; UNFINISHED if the run was asked to stop before, saved, and can be started again.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: as `steps`.
    """
    run_steps = steps(run, objective)
    while True:
        try:
            next(run_steps)
        except StopIteration as done:
            return done.value


def steps(run: config.Run, objective: Objective | None = None) -> Generator[MetricsRecord, None, int]:
    """Train a resolved run, and yield its metrics while it goes on.

        for metrics in moe_train.steps(run):
            print(metrics["step"], metrics["loss"])

    The run continues from its newest checkpoint if it has one; it evaluates and saves as `run` says. A caller that leaves the
    loop early ends the run where it is; the next call continues from the last checkpoint.

    Args:
        run: the resolved run.
        objective: replaces the objective that `run` names, for example by a custom loss (`objectives.custom.custom_objective`).

    Yields:
        The lines of metrics.jsonl: {"kind": "train" or "eval", "step": …, "loss": …, …}. The metrics of a step come when the next
        step has been started, so that the device never waits.

    Returns:
        FINISHED or UNFINISHED, as `train_run`.

    Raises:
        ValueError: the run cannot be carried out as configured. Existing checkpoints are kept.
        FileNotFoundError: a file that the run needs does not exist. Existing checkpoints are kept.
        RuntimeError: a fault while running. Existing checkpoints are kept.
    """
    rolled_back: RolledBack | None = None
    # One for all attempts, so that a signal during a roll-back is not forgotten.
    stop_request = StopRequest()
    while True:
        try:
            return (yield from _steps_from_newest(run, objective, stop_request, rolled_back))
        except StopRequested as stop:
            print(f"moe-train: stopped before the first step ({stop}); start again to continue", file=sys.stderr)
            exit_process(UNFINISHED)  # other processes may not have received the signal
            return UNFINISHED
        except UnusableCheckpoint as unusable:
            introduction.print_warning(str(unusable))
        except RolledBack as event:
            introduction.print_warning(str(event))
            rolled_back = event


def _steps_from_newest(
    run: config.Run, objective: Objective | None, stop_request: StopRequest, rolled_back: RolledBack | None
) -> Generator[MetricsRecord, None, int]:
    """Train as `steps` does.

    Args:
        run: the resolved run.
        objective: as for `steps`.
        stop_request: the signals so far.
        rolled_back: the last spike, whose data and all before are not used again; None to continue where the checkpoint was saved.

    Raises:
        UnusableCheckpoint: no step can be taken from the newest checkpoint; it was renamed, and there is an older one.
        RolledBack: a step was a spike, and an older checkpoint is the newest now.
    """
    mesh = make_mesh(run.mesh)
    # Before any data is opened or any array allocated, since it needs neither.
    check_fits(run, mesh.local_devices[0])
    with jax.set_mesh(mesh), signals(stop_request), contextlib.ExitStack() as exit_stack:
        check_transport(run.compute.transport)
        objective = objective or objective_of(run.objective)
        # Under `signals`, since tokenizing may take long and must be interruptible.
        inputs = open_inputs(run, objective)
        stop_request.starting = "reading the checkpoint"
        # Locked before the checkpoints are read, so that no other process replaces them meanwhile.
        folder = exit_stack.enter_context(RunFolder(Path(run.run_dir)))
        checkpoints = exit_stack.enter_context(manager.open_for_saving(folder.path, run.checkpoint))
        begin = starting_state(run, inputs.train, checkpoints, inputs.total_steps)
        if rolled_back is not None:
            begin = begin.after_roll_back(rolled_back.spike_step, rolled_back.spikes)
        state = begin.state
        start = int(begin.state.step)
        total_steps = inputs.total_steps
        introduction.print_damage(begin)
        if not begin.resumed:
            check_checkpoints_kept(folder.path, run.checkpoint.every_steps)
        if start >= total_steps:
            introduction.print_finished(run, begin, total_steps)
            return FINISHED

        # From here on, files are written.
        folder.write(run, inputs)
        writer = Writer(
            folder.path,
            run.metrics,
            start_step=start,
            total_steps=total_steps,
            write=jax.process_index() == 0,
            sparse_layers=config.sparse_layers(run.model),
        )
        exit_stack.enter_context(writer)
        # Entered after the writer, so that the reason of a stop is recorded before the metrics are closed.
        stopped = exit_stack.enter_context(run_log(run, folder.path, begin, inputs))
        introduction.introduce(run, writer.say, inputs, begin)
        stop_request.starting = "testing the kernels"
        run_self_tests(run, writer.say)
        stop_request.starting = "compiling the step"

        batches: Any = exit_stack.enter_context(contextlib.closing(inputs.train.iterate(start)))  # type: ignore[type-var]
        # The first batch is needed before the loop: the step is compiled for its shapes and shardings.
        batch = put_batch(next(batches), mesh)
        start_time = time.perf_counter()
        definition = definition_of(run, begin.structure, begin.optimizer, objective)
        run_step = compile_step(definition, state, batch, begin.base_weights)
        writer.say(f"compiled the step in {time.perf_counter() - start_time:.1f} s")

        stop_request.starting = "measuring the held-out loss"
        held_out = HeldOutLoss(run, mesh, inputs, begin, objective, writer)
        if start == 0:
            # The loss before training, with which every later one is compared; a resumed run has it in metrics.jsonl.
            held_out.measure(0, state)
        elif held_out.is_due(start) and rolled_back is None and begin.held_out_loss is None:
            held_out.measure(start, state)  # a signal stopped the evaluation after this step
        # From here on, a signal takes effect after a step.
        stop_request.starting = None
        if start == 0:
            yield from writer.new_records()
        saving = Saving(run, checkpoints, begin, inputs)
        figures = MetricsReader(run, mesh, state.learned, total_steps, start, state)
        writer.say(f"MFU is the share of {figures.peak_source}")
        unread: tuple[int, StepMetrics, jax.Array] | None = None

        def read(done: int, now: StepMetrics, voted: jax.Array, newest: StepMetrics) -> Votes:
            """Read the metrics of a step; fall back to an older checkpoint if the first one is not finite."""
            try:
                return figures.read(done, now, voted, newest, writer)
            finally:
                if done == start + 1 and not figures.finite:
                    saving.fall_back()

        def roll_back_after_spike() -> None:
            """Return to an older checkpoint if the step that was read last was a spike, unless no steps are left."""
            guard = run.train.spike_guard
            spike = figures.spike
            if guard is None or guard.action == "skip" or spike is None or spike.step == total_steps:
                return
            saving.roll_back(*spike)
            writer.say(f"there is no checkpoint before step {spike.step} to roll back to, so it is only skipped")

        for step in range(start + 1, total_steps + 1):
            state, step_metrics = run_step(state, batch, begin.base_weights)
            # All processes vote at every step, since a collective that only some of them enter would hang.
            voted = vote((stop_request.reason is not None, saving.is_overdue()), mesh)
            if step < total_steps:
                # The next batch is fetched while the device still computes the step that was just dispatched.
                batch = put_batch(figures.next_batch(batches), mesh)
            # Metrics and votes are read one step late, so that the device never waits for the host.
            votes = Votes()
            if unread is not None:
                votes = read(*unread, step_metrics)
                yield from writer.new_records()
                roll_back_after_spike()
            unread = step, step_metrics, voted
            stopped.step = step

            evaluates = held_out.is_due(step)
            saves = saving.is_due(step)
            if not (evaluates or saves or votes.stop or votes.save):
                # A save that failed in the background ends the run now, rather than at the next save.
                saving.check()
                continue
            # The loop pauses here anyway, so this step's metrics and vote are read at once.
            votes = read(*unread, step_metrics).combined_with(votes)
            unread = None
            yield from writer.new_records()
            roll_back_after_spike()
            loss = None
            if evaluates:
                # The last evaluation is always finished: no later start would make up for it.
                loss = held_out.measure(step, state, None if step == total_steps else StopVotes(stop_request, mesh))
                votes = votes.combined_with(Votes(stop=held_out.was_stopped))
            yield from writer.new_records()
            saves |= votes.stop or votes.save or saving.is_best(loss)
            # After a non-finite step or a spike the weights may be unusable, so no save rotates the last good checkpoint away.
            if saves and (figures.usable or votes.stop or step == total_steps):
                saving.save(step, state, loss)
            # Evaluation and saving are no part of the time of a step.
            figures.restart_timer(step)
            if votes.stop and step < total_steps:
                saving.finish()
                stopped.reason = stop_request.reason or "another process was asked to stop"
                writer.say(f"stopped after step {step} of {total_steps} ({stopped.reason}) and saved; start again to continue")
                return UNFINISHED

        saving.finish()
        introduction.conclude(run, writer.say, total_steps)
        return FINISHED
