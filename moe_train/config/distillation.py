"""The objective that learns from a teacher's log-probabilities."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from moe_train.config.section import Positive, PositiveFloat, Section


class Distillation(Section):
    """Divergence from a teacher's predictions, which `moe-train data prepare --teacher` stored with the training data.

    The teacher is not loaded for training. At each token that is trained on, teacher and student are compared on the teacher's
    most likely tokens and on all other tokens as one more outcome; with as many tokens as the vocabulary has, that is the exact
    divergence. Every source has to be a prepared set with a teacher.
    """

    records: ClassVar[tuple[str, ...]] = ("text", "chat", "completion")
    """Names of the record kinds that the objective reads."""
    loss_unit: ClassVar[str] = "divergence from the teacher in nats a token"
    """What the loss is, in documents and charts."""

    name: Literal["distillation"]
    divergence: Literal["forward", "reverse", "js"] = "forward"
    """`forward`: KL(teacher, student), which covers all that the teacher may say; `reverse`: KL(student, teacher), which avoids
    what it would not; `js`: the generalized Jensen-Shannon divergence between them (Agarwal et al. 2023, GKD).
    """
    js_beta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Weight of the teacher in the mixture of `js`, TRL's `beta`; null for 0.5. Towards 0 it behaves as `forward`, towards 1 as
    `reverse`. It has no effect on those two, and is refused there.
    """
    temperature: PositiveFloat = 1.0
    """Divisor of both models' logits. It has to be that of the prepared set, since the mass of the tokens that are not stored
    depends on it.
    """
    top_k: Positive = 64
    """Number of the teacher's tokens that are compared one by one, at most as many as the prepared set holds."""
    ce_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the next-token cross-entropy, at temperature 1, that is added to the divergence."""
    times_squared_temperature: bool = False
    """Multiply the divergence by temperature², as MaxText and Hinton et al. (2015) do, so that its gradient keeps its size whatever
    the temperature; TRL does not.
    """

    @property
    def beta(self) -> float:
        """Weight of the teacher in the mixture of `js`."""
        return 0.5 if self.js_beta is None else self.js_beta

    @model_validator(mode="after")
    def _check_effect(self) -> Self:
        if self.js_beta is not None and self.divergence != "js":
            raise ValueError(f"js_beta has no effect on divergence {self.divergence}; leave it out, or set divergence: js")
        if self.times_squared_temperature and self.temperature == 1:
            raise ValueError("times_squared_temperature has no effect at temperature 1; leave it out")
        return self
