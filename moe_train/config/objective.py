"""The training objective: a tagged union by `name`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from moe_train.config.data import Data, RecordSource, Source
from moe_train.config.distillation import Distillation
from moe_train.config.heads import Classification, Reward
from moe_train.config.preferences import Preference, UnpairedPreference
from moe_train.config.records import ClassificationRecord, PreferenceRecord, Record
from moe_train.config.section import Section


class NextToken(Section):
    """Next-token cross-entropy on the tokens that are trained on: all of a text, or the assistant's turns of a conversation."""

    records: ClassVar[tuple[str, ...]] = ("text", "chat", "completion", "transcription")
    """Names of the record kinds that the objective reads."""
    loss_unit: ClassVar[str] = "cross-entropy in nats a token"
    """What the loss is, in documents and charts."""

    name: Literal["next_token"]


Objective = Annotated[
    NextToken | Preference | UnpairedPreference | Distillation | Classification | Reward, Field(discriminator="name")
]
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
        if isinstance(source, RecordSource):
            _check_record(objective, source.record)


def _check_record(objective: Objective, record: Record) -> None:
    """Raise ValueError if a record states what the objective does not read, or something else than the objective."""
    if isinstance(record, PreferenceRecord) and record.margin is not None and not isinstance(objective, Reward):
        raise ValueError(f"record.margin has no effect on objective {objective.name}; leave it out")
    if not isinstance(record, ClassificationRecord) or not isinstance(objective, Classification):
        return
    if record.targets not in ((), objective.targets):
        raise ValueError("record.targets differ from objective.labels; leave them out, since they are filled in")


def with_targets(data: Data, objective: Objective) -> Data:
    """Return the data section with the targets and labels of the objective in its records."""
    if not isinstance(objective, Classification):
        return data
    targets = objective.targets

    def filled(source: Source) -> Source:
        if not isinstance(source, RecordSource) or not isinstance(source.record, ClassificationRecord):
            return source
        record = source.record.model_copy(update={"targets": targets})
        return source.model_copy(update={"record": record})

    return data.model_copy(update={"train": tuple(map(filled, data.train)), "eval": tuple(map(filled, data.eval))})
