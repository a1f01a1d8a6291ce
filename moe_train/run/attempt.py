"""One attempt at a run: everything that its steps need, from the newest checkpoint on.

An attempt ends where the run ends or is stopped, or where the run has to return to an older checkpoint; then another follows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
from jax.sharding import Mesh

from moe_train import config
from moe_train.checkpoint import manager
from moe_train.machine.huge_pages import grant_huge_pages
from moe_train.machine.mesh import put_batch
from moe_train.run import introduction
from moe_train.run.averaging import WeightAverage, open_average
from moe_train.run.folder import RunFolder
from moe_train.run.goodput import Goodput
from moe_train.run.held_out import HeldOutLoss
from moe_train.run.inputs import open_inputs
from moe_train.run.metrics import MetricsReader
from moe_train.run.not_finite import Diagnosis
from moe_train.run.profiling import StepProfiler
from moe_train.run.record import check_checkpoints_kept
from moe_train.run.recorders import open_recorders
from moe_train.run.reference import add_reference
from moe_train.run.saving import RolledBack, Saving
from moe_train.run.self_test import run_self_tests
from moe_train.run.shared_prompt import with_layout
from moe_train.run.start import Start, starting_state
from moe_train.run.start_check import check_start
from moe_train.run.step_programs import StepPrograms, units_per_row
from moe_train.run.stopping import StopRequest, StopVotes, Votes
from moe_train.run.suite_scores import SuiteScores, load_run_suites
from moe_train.run.tower_features import add_features
from moe_train.run.writer import Writer
from moe_train.train.objectives.choose import objective_of_run
from moe_train.train.objectives.objective import Objective
from moe_train.train.state import TrainState
from moe_train.train.step import StepMetrics
from moe_train.train.step_definition import definition_of


@dataclass
class UnreadStep:
    """A step whose results may still be on the device."""

    step: int
    metrics: StepMetrics
    voted: jax.Array
    """The votes of all processes, from `stopping.vote`."""
    batch: Any
    """The batch of the step, to find out why it is not finite."""


@dataclass
class Attempt:
    """A started run; its files are open until the ExitStack of `open_attempt` is closed."""

    run: config.Run
    mesh: Mesh
    begin: Start
    """The state that the attempt starts from, whose arrays the first step takes over, and where it comes from."""
    start: int
    """The step that the attempt starts from."""
    total_steps: int
    batches: Iterator[Any]
    batch: Any
    """The next batch, on the mesh."""
    run_step: StepPrograms
    """The compiled step."""
    held_out: HeldOutLoss
    suites: SuiteScores
    average: WeightAverage | None
    """The average of the weights; None without one."""
    saving: Saving
    figures: MetricsReader
    writer: Writer
    stopped: SimpleNamespace
    """The last step done and the reason of a stop, for the run's log; see `run_log`."""
    stop_request: StopRequest
    goodput: Goodput
    profiler: StepProfiler
    diagnosis: Diagnosis

    def measure_at_start(self, after_roll_back: bool) -> None:
        """Measure the held-out loss where no earlier process has done so."""
        self.stop_request.starting = "measuring the held-out loss"
        with self.goodput.during("evaluation"):
            if self.start == 0:
                # The loss before training, with which every later one is compared; a resumed run has it in metrics.jsonl.
                self.held_out.measure(0, self.begin.state)
                self.suites.measure(0, self.begin.state, self.writer)
            elif self.held_out.is_due(self.start) and not after_roll_back and self.begin.held_out_loss is None:
                self.held_out.measure(self.start, self.begin.state)  # a signal stopped the evaluation after this step
        self.goodput.switch("steps")
        # From here on, a signal takes effect after a step.
        self.stop_request.starting = None
        self.figures.restart_timer(self.start)

    def measure_held_out(self, step: int, state: TrainState) -> float | None:
        """Measure the held-out loss after `step`; None if there is none, or a request to stop came in between."""
        # The last evaluation is always finished: no later start would make up for it.
        is_stopped = None if step == self.total_steps else StopVotes(self.stop_request, self.mesh)
        with self.goodput.during("evaluation"):
            return self.held_out.measure(step, state, is_stopped)

    def measure_suites(self, step: int, state: TrainState) -> dict[str, float] | None:
        """Answer the suites after `step`, and return the mean score on each; None without suites."""
        with self.goodput.during("evaluation"):
            return self.suites.measure(step, state, self.writer)

    def fetch_batch(self, newest: StepMetrics) -> None:
        """Fetch the next batch, and put it on the mesh.

        Args:
            newest: the metrics of the step that was dispatched last.
        """
        waited = self.figures.waited
        batch = self.figures.next_batch(self.batches)
        # While the device still computes, the wait costs nothing.
        if newest.loss.is_ready():  # type: ignore[attr-defined]
            self.goodput.move(self.figures.waited - waited, "input")
        self.batch = put_batch(batch, self.mesh)

    def read(self, taken: UnreadStep, newest: StepMetrics, state: TrainState) -> Votes:
        """Read the metrics and votes of a step, and leave the attempt where an older checkpoint has to be used.

        From then on steps may use huge pages.

        Args:
            taken: the step to read.
            newest: the metrics of the newest step that was dispatched.
            state: the state after that step.

        Raises:
            UnusableCheckpoint: the first step is not finite; the checkpoint was set aside.
            RolledBack: the step was a spike, and newer checkpoints were set aside.
        """
        try:
            self.figures.units_per_row = units_per_row(taken.batch)
            explain = partial(self.diagnosis.explain, taken.step, state, taken.batch)
            votes = self.figures.read(taken.step, taken.metrics, taken.voted, newest, self.writer, explain)
            grant_huge_pages()
        finally:
            if taken.step == self.start + 1 and not self.figures.finite:
                self.saving.fall_back()
        return votes

    def roll_back_after_spike(self) -> None:
        """Return to an older checkpoint if the step that was read last was a spike, unless no steps are left.

        Raises:
            RolledBack: newer checkpoints were set aside.
        """
        guard = self.run.train.spike_guard
        spike = self.figures.spike
        if guard is None or guard.action == "skip" or spike is None or spike.step == self.total_steps:
            return
        self.saving.roll_back(*spike)
        self.writer.say(f"there is no checkpoint before step {spike.step} to roll back to, so it is only skipped")

    def save_if_usable(
        self, step: int, state: TrainState, loss: float | None, scores: Mapping[str, float] | None, is_last: bool
    ) -> None:
        """Save, unless the weights may be unusable after a non-finite step or a spike.

        So no save rotates the last good checkpoint away. The last save of an attempt is always tried: it says what is wrong.
        """
        if self.figures.usable or is_last:
            with self.goodput.during("checkpoint"):
                self.saving.save(step, state, loss, scores)

    def finish_saving(self) -> None:
        """Wait for the save in progress. Raises RuntimeError if it failed."""
        with self.goodput.during("checkpoint"):
            self.saving.finish()


def open_attempt(
    run: config.Run,
    objective: Objective | None,
    mesh: Mesh,
    stop_request: StopRequest,
    rolled_back: RolledBack | None,
    exit_stack: contextlib.ExitStack,
) -> Attempt | None:
    """Open the data and the newest checkpoint, compile the step, and write how the run starts.

    Args:
        run: the resolved run.
        objective: replaces the objective that the run names; None for that one.
        mesh: the mesh in force.
        stop_request: the signals so far.
        rolled_back: the last spike, whose data and all before are not used again; None to continue where the checkpoint was saved.
        exit_stack: closes the files of the attempt.

    Returns:
        The attempt; None if all steps of the run are done, and nothing was written.
    """
    goodput = Goodput()
    # What may be wrong is checked before the data are tokenized, which may take hours.
    folder = RunFolder(Path(run.run_dir))
    suites_of_run = load_run_suites(run)
    if objective is None:
        run = with_layout(run)
        objective = objective_of_run(run)
    inputs = open_inputs(run, objective)
    stop_request.starting = "reading the checkpoint"
    # Locked before the checkpoints are read, so that no other process replaces them meanwhile.
    exit_stack.enter_context(folder)
    checkpoints = exit_stack.enter_context(manager.open_for_saving(folder.path, run.checkpoint))
    begin = starting_state(run, inputs.train, checkpoints, inputs.total_steps)
    if rolled_back is not None:
        begin = begin.after_roll_back(rolled_back.spike_step, rolled_back.spikes)
    start = int(begin.state.step)
    introduction.print_damage(begin)
    if not begin.resumed:
        check_checkpoints_kept(folder.path, run.checkpoint.every_steps)
    if start >= inputs.total_steps:
        introduction.print_finished(run, begin, inputs.total_steps)
        return None

    suites = SuiteScores(run, suites_of_run, mesh, inputs, begin.structure)
    average = exit_stack.enter_context(open_average(run, begin.state))
    # From here on, files are written.
    folder.write(run, inputs)
    recorders = exit_stack.enter_context(open_recorders(run, folder.path, begin, inputs, goodput))
    writer = recorders.writer
    introduction.introduce(run, writer.say, inputs, begin)
    stop_request.starting = "computing the reference log-probabilities"
    add_reference(run, inputs, begin, objective, mesh, writer.say)
    stop_request.starting = "computing features"
    add_features(run, inputs, begin.base, mesh, writer.say)
    stop_request.starting = "testing the kernels"
    run_self_tests(run, writer.say)

    stop_request.starting = "compiling the step"
    batches: Any = exit_stack.enter_context(contextlib.closing(inputs.train.iterate(start)))  # type: ignore[type-var]
    # The first batch is needed before the loop: the step is compiled for its shapes and shardings.
    batch = put_batch(next(batches), mesh)
    check_start(run, objective, begin, batch, writer.say)
    definition = definition_of(run, begin.structure, begin.optimizer, objective)
    run_step = StepPrograms(definition, goodput, writer.say)
    run_step.compile(begin.state, batch, begin.base_weights)
    figures = MetricsReader(run, mesh, begin.state.learned, inputs.total_steps, start, begin.state)
    figures.goodput = goodput
    writer.say(f"MFU is the share of {figures.peak_source}")
    return Attempt(
        run=run,
        mesh=mesh,
        begin=begin,
        start=start,
        total_steps=inputs.total_steps,
        batches=batches,
        batch=batch,
        run_step=run_step,
        held_out=HeldOutLoss(run, mesh, inputs, begin, objective, writer),
        suites=suites,
        average=average,
        saving=Saving(run, checkpoints, begin, inputs, average),
        figures=figures,
        writer=writer,
        stopped=recorders.stopped,
        stop_request=stop_request,
        goodput=goodput,
        profiler=recorders.profiler,
        diagnosis=Diagnosis(run, definition, inputs.train, begin.base_weights),
    )
