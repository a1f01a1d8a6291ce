"""The objectives that train a head which scores a whole text: classification and rewards."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from moe_train.config.score_head import Label, ScoreHead, ScoreTarget
from moe_train.config.section import Section, as_tuple


class LabelSet(Section):
    """The labels of one target."""

    names: Annotated[tuple[Label, ...], BeforeValidator(as_tuple), Field(min_length=2)]
    """Names of the labels."""
    several: bool = False
    """Whether a text may have several of them, or none; otherwise it has exactly one."""


def _as_label_set(value: object) -> object:
    """Return a list of names as the section of a target with exactly one label."""
    return {"names": value} if isinstance(value, list | tuple) else value


class Classification(Section):
    """Classification of whole texts by a linear head at their last token, in place of the head that predicts tokens.

    A target with exactly one label is trained by cross-entropy, one with several by the mean of a binary cross-entropy for each
    label; several targets add up. With `lora: {train: [head]}` the base stays frozen and the head alone is trained.
    """

    records: ClassVar[tuple[str, ...]] = ("classification",)
    """Names of the record kinds that the objective reads."""
    loss_unit: ClassVar[str] = "cross-entropy in nats a text"
    """What the loss is, in documents and charts."""

    name: Literal["classification"]
    labels: Annotated[dict[Label, Annotated[LabelSet, BeforeValidator(_as_label_set)]], Field(min_length=1)]
    """{target: [label, …]}, or {target: {names: [label, …], several: true}} where a text may have several labels or none. The order
    is that of the head's outputs.
    """

    @property
    def scores(self) -> ScoreHead:
        """The head that the objective trains."""
        return ScoreHead(targets=self.targets)

    @property
    def targets(self) -> tuple[ScoreTarget, ...]:
        """The targets in the order of the head's outputs."""
        return tuple(ScoreTarget(name=name, labels=labels.names, several=labels.several) for name, labels in self.labels.items())

    @model_validator(mode="after")
    def _check(self) -> Self:
        # Raises ValueError for labels that are named twice.
        _ = self.targets
        return self


class Reward(Section):
    """A reward model after Bradley and Terry: -log sigmoid(chosen - rejected - margin), read at the last token of each answer."""

    records: ClassVar[tuple[str, ...]] = ("preference",)
    """Names of the record kinds that the objective reads."""
    loss_unit: ClassVar[str] = "loss of a pair of answers"
    """What the loss is, in documents and charts."""

    name: Literal["reward"]
    center_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the mean of (chosen + rejected)², which keeps rewards around 0 (arXiv:2312.09244); TRL's
    `center_rewards_coefficient`, where 0.01 is usual.
    """

    @property
    def scores(self) -> ScoreHead:
        """The head that the objective trains."""
        return ScoreHead()


HeadObjective = Classification | Reward
"""Objectives that train a head for scores."""
