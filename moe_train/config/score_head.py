"""A head that scores a whole text, in place of the one that predicts tokens: classification and rewards."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from moe_train.config.section import Section, as_tuple

Label = Annotated[str, Field(min_length=1)]
"""Name of a label, or of a target."""


class ScoreTarget(Section):
    """One question that a classifier answers, and the labels to choose from."""

    name: Label
    """Name of the target: the key of `labels` in a record."""
    labels: Annotated[tuple[Label, ...], BeforeValidator(as_tuple), Field(min_length=2)]
    """Names of the labels, in the order of the head's outputs."""
    several: bool = False
    """Whether a text may have several labels, or none, each judged on its own; otherwise it has exactly one."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"target {self.name} names a label twice; remove one")
        return self


class ScoreHead(Section):
    """A linear map from the last token's final hidden state to scores; the objectives `classification` and `reward` add it."""

    targets: Annotated[tuple[ScoreTarget, ...], BeforeValidator(as_tuple)] = ()
    """The targets of a classifier, whose labels are the outputs, one target after the other; () for a single reward."""

    @property
    def num_outputs(self) -> int:
        """Number of outputs."""
        return sum(len(target.labels) for target in self.targets) or 1

    @property
    def output_names(self) -> tuple[str, ...]:
        """Name of each output: its label, after its target where there are several."""
        if not self.targets:
            return ("reward",)
        names = []
        for target in self.targets:
            prefix = f"{target.name}/" if len(self.targets) > 1 else ""
            names += [prefix + label for label in target.labels]
        return tuple(names)

    @property
    def has_several_choices(self) -> bool:
        """Whether there are several targets, one of which has exactly one label: no class of transformers has such a loss."""
        return len(self.targets) > 1 and not all(target.several for target in self.targets)
