"""The training objective: a tagged union by `name`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from moe_train.config.data import Data, RecordSource
from moe_train.config.preferences import Preference, UnpairedPreference
from moe_train.config.section import Section


class NextToken(Section):
    """Next-token cross-entropy on the tokens that are trained on: all of a text, or the assistant's turns of a conversation."""

    records: ClassVar[tuple[str, ...]] = ("text", "chat", "completion")
    """Names of the record kinds that the objective reads."""

    name: Literal["next_token"]


Objective = Annotated[NextToken | Preference | UnpairedPreference, Field(discriminator="name")]
"""The tagged union of objectives."""


def extra_forward_passes(objective: Objective, has_adapters: bool) -> int:
    """Return the number of forward passes over a batch that a step takes besides the one that is differentiated.

    With adapters the reference model takes one; stored log-probabilities take none. KTO takes one more of each for mismatched
    answers.
    """
    match objective:
        case Preference():
            return int(objective.has_reference and has_adapters)
        case UnpairedPreference():
            return 1 + 2 * has_adapters
        case _:
            return 0


def check_records(objective: Objective, data: Data) -> None:
    """Raise ValueError if a source has records of a kind that the objective does not read."""
    for source in (*data.train, *data.eval):
        # A prepared set has no section of a record; its manifest says what it holds.
        if isinstance(source, RecordSource) and source.record.name not in objective.records:
            kinds = ", ".join(objective.records)
            raise ValueError(
                f"objective {objective.name} reads records of kind {kinds}, not {source.record.name}; change record in the source"
            )
