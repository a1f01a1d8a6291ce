"""Kinds of records in a source, which training reads with a single record section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moe_train import config
from moe_train.data.check.findings import KindCount
from moe_train.data.check.sources import CheckedFile
from moe_train.data.records.problem import Problem


@dataclass
class _Kind:
    """The records of a source that are read with one section."""

    place: CheckedFile
    """The file of the first one."""
    first: int
    """Line, row or byte of the first one."""
    records: int = 0
    without_problems: int = 0


class Kinds:
    """The kinds of records of each source."""

    def __init__(self) -> None:
        self._kinds: dict[int, dict[str, _Kind]] = {}

    def add(self, place: CheckedFile, kinds: Mapping[str, KindCount]) -> None:
        """Add the kinds of the next chunk."""
        kinds_of_source = self._kinds.setdefault(place.source, {})
        for name, (first, records, without_problems) in kinds.items():
            kind = kinds_of_source.setdefault(name, _Kind(place, first))
            kind.records += records
            kind.without_problems += without_problems

    def problems(self) -> Iterator[tuple[CheckedFile, int, Problem, int]]:
        """Yield a problem for each kind after the first of a source.

        Yields:
            The file and the number of the first record of the kind, the problem, and how many records of the kind have no other.
        """
        for kinds in self._kinds.values():
            # Kinds are in the order of their first records, so the first one stands for what the source should hold.
            named = list(kinds.items())
            for name, kind in named[1:]:
                first_name, first = named[0]
                subject = "1 record has" if kind.records == 1 else f"{kind.records:,} records have"
                message = (
                    f"{subject} {name}; the first kind of the source has {first_name}, as in {first.place.location(first.first)}"
                )
                remedy = "put each kind of records into files of its own, and name those as a source of their own"
                yield kind.place, kind.first, Problem("mixed-kinds", message, remedy), kind.without_problems


def kind_of(section: config.Record) -> str:
    """Describe the kind of records that a section reads."""
    match section:
        case config.TextRecord(column=column):
            return f"a text in column {column}"
        case config.ChatRecord():
            return "messages"
        case config.CompletionRecord(prompt=prompt, completion=completion):
            return f"a completion in columns {prompt} and {completion}"
        case config.PreferenceRecord(chosen=chosen, rejected=rejected):
            return f"a preference pair in columns {chosen} and {rejected}"
        case config.ClassificationRecord(labels=labels):
            return f"a text with labels in column {labels}"
        case config.LabelledRecord(label=label):
            return f"an answer labelled by column {label}"
        case config.TranscriptionRecord(audio=audio, text=text):
            return f"a transcription in columns {audio} and {text}"
