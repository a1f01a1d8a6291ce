"""Length and batch shape of a training run, and when it is evaluated, saved and logged."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moe_train.config.section import Fraction, LocalPath, NonNegative, Positive, PositiveFloat, Section
from moe_train.config.trackers import Tracker


class SpikeGuard(Section):
    """What happens to a step whose loss or gradient norm jumps.

    A step is a spike if `metric` exceeds the median of the last `window` steps by more than `factor` robust standard deviations.
    """

    metric: Literal["loss", "grad_norm"] = "loss"
    """Quantity that is watched."""
    window: Annotated[int, Field(ge=4, le=10_000)] = 64
    """Number of recent steps whose median is compared with; the guard begins when it is full, and spikes do not enter it."""
    factor: PositiveFloat = 8.0
    """Number of robust standard deviations (1.4826 median absolute deviations, at least 1% of the median) above the median from
    which a step is a spike. Lower it to act on smaller jumps.
    """
    action: Literal["skip", "roll_back"]
    """`skip` leaves out the update of a spike; `roll_back` also returns to an earlier checkpoint and continues with the data that
    follow the spike.
    """
    steps_back: Positive | None = None
    """With `roll_back`: least number of steps between the checkpoint and the spike; null is 1."""
    max_events: Positive = 10
    """Number of spikes after which one more stops the run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.steps_back is not None and self.action == "skip":
            raise ValueError("steps_back has no effect with action skip; leave it out, or set action to roll_back")
        return self


class Train(Section):
    """Length and batch shape of the optimization. Exactly one of `steps`, `epochs` and `tokens` sets the length."""

    steps: Annotated[Positive, Field(le=100_000_000)] | None = None
    """Length of the run in optimizer steps. State exactly one of steps, epochs and tokens."""
    epochs: Positive | None = None
    """Length of the run in passes over the training data."""
    tokens: Positive | None = None
    """Length of the run in tokens, padding included; rounded up to whole steps."""
    batch_size: Positive
    """Number of sequences in one optimizer step over all devices and microbatches."""
    seq_len: Positive
    """Length of a sequence in tokens; examples are packed into rows of this length."""
    microbatches: Positive = 1
    """Number of parts, one after the other, into which a step splits its batch. Raise it if activations do not fit into memory;
    losses stay the same.
    """
    max_skipped_steps: NonNegative = 3
    """Number of steps with a loss or gradient that is not finite, whose updates are left out, after which one more stops the run.
    """
    spike_guard: SpikeGuard | None = None
    """What happens to a step whose loss or gradient norm jumps but is finite; null: nothing."""
    capacity_factor: PositiveFloat | None = None
    """Limits an expert to capacity_factor * T * A / E assignments in a sequence of T tokens (A experts per token, E experts),
    during training only. Assignments beyond that are dropped, and earlier tokens have priority. Null: nothing is dropped.
    """
    max_drop_rate: Fraction | None = None
    """Fraction of a layer's assignments above which dropping in one step stops the run; required with capacity_factor."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        stated = [k for k in ("steps", "epochs", "tokens") if getattr(self, k) is not None]
        if len(stated) != 1:
            raise ValueError(
                f"state the length of the run as exactly one of steps, epochs, tokens (stated: {', '.join(stated) or 'none'})"
            )
        if self.batch_size % self.microbatches:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of microbatches {self.microbatches}; change either")
        guard = self.spike_guard
        if guard is not None and self.steps is not None and guard.window >= self.steps:
            raise ValueError(
                f"spike_guard.window {guard.window} is never full in {self.steps} steps, so the guard has no effect; use a smaller "
                "window, or leave spike_guard out"
            )
        if self.capacity_factor is not None and self.max_drop_rate is None:
            raise ValueError("state max_drop_rate with capacity_factor (0.1 stops the run if a tenth is dropped; 1 never stops it)")
        if self.capacity_factor is None and self.max_drop_rate is not None:
            raise ValueError("max_drop_rate has no effect without a capacity_factor: nothing is dropped; leave it out")
        # The number of steps is rounded up, so fewer tokens would still train for a whole step.
        tokens_per_step = self.batch_size * self.seq_len
        if self.tokens is not None and self.tokens < tokens_per_step:
            raise ValueError(f"tokens {self.tokens} is less than one step of {tokens_per_step} (batch_size x seq_len); raise it")
        return self


class Evaluation(Section):
    """When the held-out loss on `data.eval` is measured: every `every_steps` steps and at the end."""

    every_steps: Positive = 100
    """Number of steps between measurements; one more follows the last step."""
    batches: Positive | None = None
    """Number of batches of `data.eval` to measure; null for all."""
    drift_batches: NonNegative | None = None
    """Number of these batches on which the routing of a model with adapters is compared with that of its base model, which takes a
    second forward pass. Null: 4 if the model has adapters and routers; 0: none.
    """
    suites: tuple[LocalPath, ...] = ()
    """YAML files of suites, whose questions are answered and graded during the run. Suites with the grader `function` or `judge`
    are for the command `evaluate` alone.
    """
    suites_every_steps: Positive | None = None
    """Number of steps between answers to the suites; one more follows the last step. Null: `every_steps`."""
    suite_data: LocalPath | None = None
    """Folder that the suites' items are relative to; null for that of each suite's file."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("suites_every_steps", "suite_data"):
            if getattr(self, key) is not None and not self.suites:
                raise ValueError(f"{key} has no effect without suites; name some, or leave it out")
        return self


class Checkpoint(Section):
    """When the state of the run is saved, and which checkpoints are kept: the last `keep_last`, plus the best."""

    every_steps: Positive = 100
    """Number of steps between saves; one more follows the last step."""
    every_minutes: PositiveFloat | None = 30.0
    """Minutes after which a save is made in any case; null saves by steps alone."""
    keep_last: Positive = 2
    """Number of newest checkpoints that stay. With 1 the one before stays until the next save begins, since only the steps after a
    save show that its weights can be used; the disk holds two at its peak in either case.
    """
    keep_best: bool = True
    """Whether the best checkpoint stays too."""
    best_by: str = "loss"
    """What makes a checkpoint the best: `loss`, the lowest held-out loss, or the name of a suite of `evaluation.suites`, the
    highest score on it.
    """


class Metrics(Section):
    """How often metrics are logged, and where they go in addition to the terminal and `metrics.jsonl`."""

    every_steps: Positive = 1
    """Number of steps between lines of metrics."""
    tensorboard: bool = True
    """Whether metrics are also written as TensorBoard events into the run's folder."""
    trackers: tuple[Tracker, ...] = ()
    """Experiment trackers that receive the metrics as well; each needs the extra of its name."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [tracker.name for tracker in self.trackers]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"trackers names {name} twice; keep one of them")
        return self
