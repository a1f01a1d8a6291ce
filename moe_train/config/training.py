"""Length and batch shape of a training run, and when it is evaluated, saved and logged."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moe_train.config.section import Fraction, NonNegative, Positive, PositiveFloat, Section


class SpikeGuard(Section):
    """What happens to a step whose loss or gradient norm jumps.

    A step is a spike if `metric` exceeds the median of the last `window` steps by more than `factor` robust standard deviations
    (1.4826 median absolute deviations, at least 1% of the median). The guard begins when the window is full; spikes do not enter
    it. action: skip leaves out the update of a spike; roll_back also returns to the newest checkpoint at least `steps_back`
    steps before it (null: 1), and continues with the data that follow the spike. The run stops after more than max_events spikes.
    """

    metric: Literal["loss", "grad_norm"] = "loss"
    window: Annotated[int, Field(ge=4, le=10_000)] = 64
    factor: PositiveFloat = 8.0
    action: Literal["skip", "roll_back"]
    steps_back: Positive | None = None
    max_events: Positive = 10

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.steps_back is not None and self.action == "skip":
            raise ValueError("steps_back has no effect with action skip; leave it out, or set action to roll_back")
        return self


class Train(Section):
    """Length and batch shape of the optimization. Exactly one of `steps`, `epochs` and `tokens` sets the length.

    batch_size is the number of sequences in one optimizer step over all devices; `microbatches` splits it. The run stops after
    more than max_skipped_steps steps whose loss or gradient is not finite; spike_guard handles those that are only too large.
    capacity_factor limits an expert to capacity_factor * T * A / E assignments in a sequence of T tokens (A experts per token, E
    experts), during training only. Assignments beyond that are dropped, and earlier tokens have priority (null: nothing is
    dropped). The run stops when a layer drops more than the fraction max_drop_rate of its assignments in one step.
    """

    steps: Annotated[Positive, Field(le=100_000_000)] | None = None
    epochs: Positive | None = None
    tokens: Positive | None = None
    batch_size: Positive
    seq_len: Positive
    microbatches: Positive = 1
    max_skipped_steps: NonNegative = 3
    spike_guard: SpikeGuard | None = None
    capacity_factor: PositiveFloat | None = None
    max_drop_rate: Fraction | None = None

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
    """When the held-out loss on `data.eval` is measured.

    It is measured every `every_steps` steps and at the end, on `batches` batches (null: all). drift_batches: on how many of these
    batches the routing of a model with adapters is compared with that of its base model, which takes a second forward pass
    (null: 4 if the model has adapters and routers; 0: none).
    """

    every_steps: Positive = 100
    batches: Positive | None = None
    drift_batches: NonNegative | None = None


class Checkpoint(Section):
    """When the state of the run is saved, and which checkpoints are kept: the last `keep_last`, plus the best by held-out loss.

    With keep_last 1 the one before stays until the next save begins, since only the steps after a save show that its weights can
    be used; the disk holds two at its peak in either case.
    """

    every_steps: Positive = 100
    every_minutes: PositiveFloat | None = 30.0
    keep_last: Positive = 2
    keep_best: bool = True


class Metrics(Section):
    """How often metrics are logged, and where they go in addition to the terminal and `metrics.jsonl`."""

    every_steps: Positive = 1
    tensorboard: bool = True
