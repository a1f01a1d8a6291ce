"""Measure the held-out loss during a run, and the routing drift of a model with adapters."""

from __future__ import annotations

from collections.abc import Callable

from jax.sharding import Mesh

from moe_train import config
from moe_train.evaluate.held_out import EvaluationStopped, evaluate_held_out
from moe_train.evaluate.loss import make_batch_sums
from moe_train.evaluate.routing import Drift, make_drift_sums
from moe_train.model.parameters import with_expert_ids
from moe_train.run.inputs import RunInputs
from moe_train.run.start import Start
from moe_train.run.writer import Writer
from moe_train.train.objectives.objective import Objective
from moe_train.train.state import TrainState

DRIFT_BATCHES = 4
"""Number of held-out batches on which routing is compared with the base model's if `evaluation.drift_batches` is not set."""


class HeldOutLoss:
    """Measure the held-out loss at the steps where it is due; without held-out data it is never due."""

    def __init__(self, run: config.Run, mesh: Mesh, inputs: RunInputs, begin: Start, objective: Objective, writer: Writer) -> None:
        self.was_stopped = False
        """Whether the last measurement was stopped before its end, in all processes."""
        self._run = run
        self._mesh = mesh
        self._loader = inputs.held_out
        self._writer = writer
        self._total_steps = inputs.total_steps
        structure = begin.structure
        if objective.uses_reference and not begin.state.frozen:
            # The experts that the reference chose are stored, so that routing is compared on every batch at no further cost.
            structure = with_expert_ids(structure)
        self._sums = make_batch_sums(structure, objective, begin.base_weights)
        self._drift: Drift | None = None
        batches = drift_batches(run)
        if self._loader is not None and batches and begin.base is not None:
            self._drift = Drift(make_drift_sums(begin.structure, objective), begin.base_weights, batches)
            writer.say(f"routing is compared with the base model's on {batches} held-out batches, a second forward pass for each")

    def is_due(self, step: int) -> bool:
        """Return whether the loss is measured after `step`: every `evaluation.every_steps` steps and after the last one."""
        is_step = step % self._run.evaluation.every_steps == 0 or step == self._total_steps
        return self._loader is not None and is_step

    def measure(self, step: int, state: TrainState, is_stopped: Callable[[], bool] | None = None) -> float | None:
        """Measure the held-out loss after `step`, write its metrics and return it.

        Returns None without held-out data, or if `is_stopped`, which is asked before each batch, says so in all processes.
        """
        if self._loader is None:
            return None
        batches = self._run.evaluation.batches
        self.was_stopped = False
        weights = (state.learned, state.frozen)
        try:
            measured = evaluate_held_out(self._sums, *weights, self._loader, self._mesh, batches, self._drift, is_stopped)
        except EvaluationStopped:
            self.was_stopped = True
            return None
        self._writer.evaluation(step, measured)
        return measured["loss"]


def drift_batches(run: config.Run) -> int:
    """Return the number of held-out batches on which routing is compared with the base model's.

    Returns:
        0 for a run without adapters or a model without routers.
    """
    if run.lora is None or not isinstance(run.model.ffn, config.MoeFfn):
        return 0
    stated = run.evaluation.drift_batches
    return DRIFT_BATCHES if stated is None else stated
