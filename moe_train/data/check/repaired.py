"""Correct the records of a chunk where only one correction is right, and write those that training accepts.

A record that breaks no rule stays as it is, byte for byte. One that breaks a rule is corrected; where that is impossible it
stays as it is if training accepts it, and is dropped otherwise. A record with keys that are not read is never changed, since
these may depend on what would change.
"""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Collection
from typing import NamedTuple

from moe_train.data.check import rules
from moe_train.data.check.findings import Change, CorrectedChunk, ReadRecord
from moe_train.data.check.requirements import Requirements
from moe_train.data.records.file_bytes import BOM
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem
from moe_train.data.records.unread import is_ignored
from moe_train.data.records.write_back import denormalise
from moe_train.machine.files import JsonObject


class Attempt(NamedTuple):
    """A record after its repair."""

    entry: ReadRecord
    """The repaired record, with the columns to write; its problems have not been looked for yet."""
    changes: list[tuple[str, str]]
    """(rule, what was changed) for each change."""


def attempts(read: list[ReadRecord], form: Requirements) -> tuple[dict[int, Attempt], dict[int, str]]:
    """Repair the records that have problems.

    Returns:
        The repaired records by their numbers; and for the others with problems, the reason why they cannot be repaired.
    """
    repaired: dict[int, Attempt] = {}
    reasons: dict[int, str] = {}
    for entry in read:
        if not entry.problems:
            continue
        reasons[entry.number] = "; ".join(problem.message for problem in entry.problems)
        if not isinstance(entry.record, str | Conversation):
            continue
        record, changes = rules.repair(entry.record, form)
        if not changes:
            continue
        # A key that is not read may hold what the correction would contradict, such as the text of a turn.
        blocking = [name for name in entry.unread if not is_ignored(name, entry.section.ignore)]
        if blocking:
            reasons[entry.number] += f" (not corrected, since {blocking[0]} is not read: --ignore {blocking[0]} permits it)"
            continue
        if not isinstance(record, str) and not record.messages:
            reasons[entry.number] = "nothing is left of it"
            continue
        fields = denormalise(entry.fields, record, entry.section)
        if fields is None:
            reasons[entry.number] += " (not corrected, since the correction has no place in its columns)"
            continue
        edited = dataclasses.replace(entry, fields=fields, record=record, problems=[], examples=[])
        repaired[entry.number] = Attempt(edited, changes)
    return repaired, reasons


def corrected_chunk(
    read: list[ReadRecord],
    unreadable: list[tuple[int, Problem]],
    raw: dict[int, bytes],
    repaired: dict[int, Attempt],
    reasons: dict[int, str],
    accepted: Collection[int],
) -> CorrectedChunk:
    """Return the corrected chunk.

    Args:
        read: The records.
        unreadable: The records that cannot be read, with their problems.
        raw: The lines of records that are lines, by their numbers.
        repaired: The repaired records, judged again.
        reasons: Why other records could not be repaired.
        accepted: Numbers of the records that training accepts although they have problems.
    """
    changes = [Change(number, "dropped", problem.rule, problem.message) for number, problem in unreadable]
    lines: dict[int, bytes] = {}
    for entry in read:
        attempt = repaired.get(entry.number)
        if attempt is not None and not attempt.entry.problems:
            changes += [Change(entry.number, "changed", rule, change) for rule, change in attempt.changes]
            lines[entry.number] = _line(attempt.entry.fields)
            continue
        if entry.problems:
            reason = reasons[entry.number]
            if attempt is not None:
                reason = "; ".join(problem.message for problem in attempt.entry.problems)
            action = "left" if entry.number in accepted else "dropped"
            changes.append(Change(entry.number, action, entry.problems[0].rule, reason))
            if action == "dropped":
                continue
        # A good line is copied as it is; the byte order mark of the first one belongs to the old file.
        line = raw.get(entry.number)
        lines[entry.number] = _line(entry.fields) if line is None else line.removeprefix(BOM).strip()
    contents = b"".join(lines[number] + b"\n" for number in sorted(lines))
    return CorrectedChunk(contents, len(lines), sorted(changes, key=operator.attrgetter("number")))


def _line(fields: JsonObject) -> bytes:
    """Serialize a record as JSON.

    Raises:
        ValueError: If a value of a columnar file has no form in JSON.
    """
    try:
        return json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair in a column that is not trained on
        return json.dumps(fields).encode()
    except TypeError as error:
        raise ValueError(f"a column cannot be written as JSON ({error}); leave it out of the file, and fix that") from error
