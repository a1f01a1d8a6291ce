"""The training loop: from a resolved run to its last checkpoint."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator

import jax

from moe_train import config
from moe_train.machine.mesh import make_mesh
from moe_train.machine.processes import UNFINISHED, exit_process
from moe_train.model.moe.transport.choose import check_transport
from moe_train.plan.fits import check_fits
from moe_train.run import introduction
from moe_train.run.attempt import Attempt, UnreadStep, open_attempt
from moe_train.run.bucket import in_working_folder
from moe_train.run.saving import RolledBack, UnusableCheckpoint
from moe_train.run.stopping import StopRequest, StopRequested, Votes, signals, vote
from moe_train.run.trackers.trackers import check_trackers
from moe_train.run.writer import MetricsRecord
from moe_train.train.objectives.objective import Objective

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
        The lines of metrics.jsonl: {"kind": "train", "eval" or "suite", "step": …, "loss": …, …}. The metrics of a step come when
        the next step has been started, so that the device never waits.

    Returns:
        FINISHED or UNFINISHED, as `train_run`.

    Raises:
        ValueError: the run cannot be carried out as configured. Existing checkpoints are kept.
        FileNotFoundError: a file that the run needs does not exist. Existing checkpoints are kept.
        RuntimeError: a fault while running. Existing checkpoints are kept.
    """
    with in_working_folder(run) as local_run:
        return (yield from _attempts(local_run, objective))


def _attempts(run: config.Run, objective: Objective | None) -> Generator[MetricsRecord, None, int]:
    """Attempt a run until it is finished or stopped, each time from its newest checkpoint. Yields and returns as `steps`."""
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
    # Before any data is opened or any array allocated, since they need neither.
    check_trackers(run.metrics.trackers)
    check_fits(run, mesh.local_devices[0])
    # Under `signals`, since tokenizing may take long and must be interruptible.
    with jax.set_mesh(mesh), signals(stop_request), contextlib.ExitStack() as exit_stack:
        check_transport(run.compute.transport)
        attempt = open_attempt(run, objective, mesh, stop_request, rolled_back, exit_stack)
        if attempt is None:
            return FINISHED
        attempt.measure_at_start(after_roll_back=rolled_back is not None)
        if attempt.start == 0:
            yield from attempt.writer.new_records()
        return (yield from _take_steps(attempt))


def _take_steps(attempt: Attempt) -> Generator[MetricsRecord, None, int]:
    """Take the steps of an attempt; evaluate, save and stop between them. Yields and returns as `steps`."""
    run, mesh, total_steps = attempt.run, attempt.mesh, attempt.total_steps
    held_out, saving, writer = attempt.held_out, attempt.saving, attempt.writer
    state = attempt.begin.state
    unread: UnreadStep | None = None
    for step in range(attempt.start + 1, total_steps + 1):
        batch = attempt.batch
        attempt.profiler.before_step(step, state)
        state, step_metrics = attempt.run_step(state, batch, attempt.begin.base_weights)
        attempt.profiler.after_step(step, step_metrics)
        if attempt.average is not None:
            attempt.average.after_step(state)
        # All processes vote at every step, since a collective that only some of them enter would hang.
        voted = vote((attempt.stop_request.reason is not None, saving.is_overdue()), mesh)
        if step < total_steps:
            # The next batch is fetched while the device still computes the step that was just dispatched.
            attempt.fetch_batch(step_metrics)
        # Metrics and votes are read one step late, so that the device never waits for the host.
        votes = Votes()
        if unread is not None:
            votes = attempt.read(unread, step_metrics, state)
            yield from writer.new_records()
            attempt.roll_back_after_spike()
        unread = UnreadStep(step, step_metrics, voted, batch)
        attempt.stopped.step = step

        evaluates = held_out.is_due(step)
        answers = attempt.suites.are_due(step)
        saves = saving.is_due(step)
        if not (evaluates or answers or saves or votes.stop or votes.save):
            # A save that failed in the background ends the run now, rather than at the next save.
            saving.check()
            continue
        # The loop pauses here anyway, so this step's metrics and vote are read at once.
        votes = attempt.read(unread, step_metrics, state).combined_with(votes)
        unread = None
        yield from writer.new_records()
        attempt.roll_back_after_spike()
        loss = None
        if evaluates:
            loss = attempt.measure_held_out(step, state)
            votes = votes.combined_with(Votes(stop=held_out.was_stopped))
        # A request to stop comes first; then this step has no scores.
        scores = attempt.measure_suites(step, state) if answers and not votes.stop else None
        yield from writer.new_records()
        is_best = saving.is_best(loss, scores)
        if saves or is_best or votes.stop or votes.save:
            attempt.save_if_usable(step, state, loss, scores, is_last=votes.stop or step == total_steps)
        # Evaluation and saving are no part of the time of a step.
        attempt.figures.restart_timer(step)
        if votes.stop and step < total_steps:
            attempt.finish_saving()
            reason = attempt.stop_request.reason or "another process was asked to stop"
            attempt.stopped.reason = reason
            writer.say(attempt.goodput.summary().in_words())
            writer.say(f"stopped after step {step} of {total_steps} ({reason}) and saved; start again to continue")
            return UNFINISHED

    attempt.finish_saving()
    writer.say(attempt.goodput.summary().in_words())
    writer.is_finished = True
    introduction.conclude(run, writer.say, total_steps)
    return FINISHED
