"""Length and batch shape of a training run, and when it is evaluated, saved and logged."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from moe_train.config.section import Fraction, NonNegative, Positive, PositiveFloat, Section


class Train(Section):
    """Length and batch shape of the optimization. Exactly one of `steps`, `epochs` and `tokens` sets the length.

    batch_size is the number of sequences in one optimizer step over all devices; `microbatches` splits it.
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
    """When the state of the run is saved, and which checkpoints are kept: the last `keep_last`, plus the best by held-out loss."""

    every_steps: Positive = 100
    every_minutes: PositiveFloat | None = 30.0
    keep_last: Positive = 2
    keep_best: bool = True


class Metrics(Section):
    """How often metrics are logged, and where they go in addition to the terminal and `metrics.jsonl`."""

    every_steps: Positive = 1
    tensorboard: bool = True
