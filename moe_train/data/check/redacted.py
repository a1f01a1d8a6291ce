"""Search the records of a chunk for personal data, and replace it if records are corrected."""

from __future__ import annotations

from typing import NamedTuple

from moe_train.data.check.findings import Change, Question, ReadRecord
from moe_train.data.check.personal_data import scan_record
from moe_train.data.records.conversation import read as read_record
from moe_train.data.records.problem import Problem


class SearchedChunk(NamedTuple):
    """The records of a chunk after the search."""

    read: list[ReadRecord]
    """The records, without personal data if they are corrected."""
    problems: list[tuple[int, Problem]]
    """(line, row or byte; problem) for each place with personal data."""
    unreadable: list[tuple[int, Problem]]
    """Records that cannot be read any more without it, such as one whose number became a text."""
    changes: list[Change]
    """What was replaced."""


def search_personal_data(read: list[ReadRecord], raw: dict[int, bytes], question: Question) -> SearchedChunk:
    """Search the records of a chunk; nothing is searched unless the question asks for it.

    Args:
        read: The records.
        raw: The lines of records that are lines, by their numbers; those that are changed are taken out.
        question: What to examine.
    """
    if question.personal_data is None:
        return SearchedChunk(read, [], [], [])
    result = SearchedChunk([], [], [], [])
    for entry in read:
        scanned = scan_record(entry.fields, question.personal_data.phone_region, question.allowed)
        result.problems.extend((entry.number, problem) for problem in scanned.problems)
        if not scanned.changes or not question.repairing:
            result.read.append(entry)
            continue
        # The line as it was holds what was replaced.
        raw.pop(entry.number, None)
        assert isinstance(scanned.fields, dict)
        try:
            again = read_record(scanned.fields, entry.section)
        except Problem as problem:
            result.unreadable.append((entry.number, problem))
            continue
        result.read.append(ReadRecord(entry.number, scanned.fields, entry.section, *again))
        result.changes.extend(Change(entry.number, "changed", rule, change) for rule, change in scanned.changes)
    return result
