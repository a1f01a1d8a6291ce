"""What a run trains its model for: the objective, a tagged union by `name`."""

from __future__ import annotations

from typing import ClassVar, Literal

from moe_train.config.data import Data, RecordSource
from moe_train.config.section import Section


class NextToken(Section):
    """Cross-entropy of the tokens that bear loss: of all text, or of what the assistant says in a conversation."""

    records: ClassVar[tuple[str, ...]] = ("text", "chat", "completion")
    """Names of the record kinds that it reads."""

    name: Literal["next_token"]


# A second member makes this `Annotated[NextToken | Other, Field(discriminator="name")]`; pydantic takes no union of one.
Objective = NextToken


def check_records(objective: Objective, data: Data) -> None:
    """Raise ValueError where a source's records are of a kind that the objective does not read."""
    for source in (*data.train, *data.eval):
        if isinstance(source, RecordSource) and source.record.name not in objective.records:
            kinds = ", ".join(objective.records)
            raise ValueError(f"objective {objective.name} reads records of kind {kinds}, not {source.record.name}; change record")
