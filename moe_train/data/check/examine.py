"""Examine a chunk of records: find their problems, tokens and fingerprints, and correct them.

The findings depend only on the chunk, so any process can examine it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from moe_train import config
from moe_train.data.chat import conversation_to_tokens
from moe_train.data.chat.encode import encode
from moe_train.data.chat.example import Example, MergedTurns, fitting_tokens, uses_tools
from moe_train.data.check import rules
from moe_train.data.check.duplicates import Fingerprints, fingerprints
from moe_train.data.check.ngrams import words
from moe_train.data.check.overlap import overlap, said_in
from moe_train.data.check.requirements import Requirements
from moe_train.data.records.conversation import denormalise, normalise, recognise
from moe_train.data.records.file_bytes import BOM
from moe_train.data.records.json_lines import Block, records_in
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Item, Problem
from moe_train.data.records.source import Origin
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.tokenizer import Tokenizer

_STILL_TOKENISED = {"control-token"}  # training accepts records that break these rules, and treats the tokens as plain text


@dataclass(frozen=True)
class Question:
    """What to examine; it is sent to each process once."""

    records: tuple[config.Record | None, ...]
    """How to read the records of each place; None to recognize each record by its columns."""
    tokenizer: Tokenizer
    template: str | None
    seq_len: int | None = None
    """Positions in a row; None if unknown."""
    allowed: frozenset[str] = frozenset()
    """Rules that may be broken."""
    repairing: bool = False
    """Whether to correct records."""
    held_out: np.ndarray | None = None
    """Sorted hashes of the word sequences of the evaluation set; None without one."""


class Chunk(NamedTuple):
    """Records of a place to examine together: a block of lines, single sampled lines, or rows."""

    place: int
    records: Block | list[Block] | list[tuple[int, Item]]


class Change(NamedTuple):
    """A change to a record."""

    number: int
    """Line, row or byte of the record."""
    action: str
    """"changed" or "dropped"."""
    rule: str
    """The rule that it broke."""
    what: str
    """The change, or the reason why the record was dropped."""


class Kept(NamedTuple):
    """A corrected chunk."""

    lines: bytes
    """The records as JSON lines."""
    num_records: int
    """Number of records in `lines`."""
    changes: list[Change]


class Findings(NamedTuple):
    """The findings for one chunk."""

    place: int
    num_records: int
    """Number of records, including bad ones."""
    shapes: Counter[str]
    """Number of records of each kind."""
    problems: list[tuple[int, Problem]]
    """(line, row or byte; problem) for each problem."""
    lengths: Counter[tuple[str, int]]
    """(kind, ids) -> number of examples with so many ids."""
    loss_tokens: int
    """Number of ids that are trained on."""
    fitting: Counter[tuple[str, int, int]]
    """(kind, ids, ids of the turns that fit) -> number of examples of turns with tools of which only some fit into a row."""
    merged: Counter[str]
    """Sums over the examples of turns with tools: examples, turns, tokens, and separate_tokens (with an example for each turn)."""
    restarts: Counter[str]
    """Reason why turns could not be appended to the example before -> number of examples."""
    numbers: np.ndarray
    """(n,): line, row or byte of each record in `prints`."""
    prints: Fingerprints
    """The fingerprints of the records that could be read."""
    overlapping: np.ndarray
    """Line, row or byte of each record that overlaps the evaluation set."""
    held_out: np.ndarray
    """Indices of the evaluation set's hashes that were found."""
    kept: Kept | None
    """The corrected chunk; None if records are not corrected."""


class Stop(ValueError):
    """An error for records that the tokenizer cannot represent at all, which ends the check: (place, number, what, remedy)."""

    def __str__(self) -> str:
        return f"{self.args[2]}; {self.args[3]}"


@dataclass
class _Read:
    """A record that has been read, and the results for it."""

    number: int
    fields: dict[str, Any]
    section: config.Record
    record: str | Conversation
    problems: list[Problem] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)


def examine(chunk: Chunk, question: Question, form: Requirements) -> Findings:
    """Examine a chunk.

    Args:
        chunk: The records.
        question: What to examine.
        form: The form of records for the tokenizer (see `form_of`).

    Raises:
        Stop: For the first record of a kind that the tokenizer cannot represent.
    """
    read: list[_Read] = []
    unreadable: list[tuple[int, Problem]] = []
    raw: dict[int, bytes] = {}
    num_records = 0
    for number, item, line in _items(chunk, keep=question.repairing):
        num_records += 1
        if line is not None:
            raw[number] = line
        if isinstance(item, Problem):
            unreadable.append((number, item))
            continue
        try:
            section = question.records[chunk.place] or recognise(item)
            read.append(_Read(number, item, section, normalise(item, section)))
        except Problem as problem:
            unreadable.append((number, problem))
    _judge(read, chunk.place, question, form)
    problems = list(unreadable)
    lengths: Counter[tuple[str, int]] = Counter()
    loss_tokens = 0
    fitting: Counter[tuple[str, int, int]] = Counter()
    merged: Counter[str] = Counter()
    restarts: Counter[str] = Counter()
    for entry in read:
        problems += [(entry.number, problem) for problem in entry.problems]
        lengths.update((entry.section.name, len(example.tokens)) for example in entry.examples)
        loss_tokens += sum(map(_loss_tokens, entry.examples))
        for example in entry.examples:
            if example.merged is not None:
                merged += _sums(example.tokens, example.merged)
                restarts.update(filter(None, [example.merged.restart]))
                num_fitting = fitting_tokens(example.merged, (question.seq_len or len(example.tokens)) + 1)
                if 0 < num_fitting < len(example.tokens):
                    fitting[entry.section.name, len(example.tokens), num_fitting] += 1
    texts = words([said_in(entry.record) for entry in read])
    overlapping, held_out = overlap(texts, question.held_out)

    numbers = np.array([entry.number for entry in read], np.int64)
    return Findings(
        place=chunk.place,
        num_records=num_records,
        shapes=Counter(_shape(entry) for entry in read),
        problems=sorted(problems, key=lambda pair: pair[0]),
        lengths=lengths,
        loss_tokens=loss_tokens,
        fitting=fitting,
        merged=merged,
        restarts=restarts,
        numbers=numbers,
        prints=fingerprints([_content(entry.record) for entry in read], texts),
        overlapping=numbers[overlapping],
        held_out=held_out,
        kept=_repaired(read, unreadable, raw, chunk.place, question, form) if question.repairing else None,
    )


def _items(chunk: Chunk, keep: bool) -> Iterator[tuple[int, Item, bytes | None]]:
    """Yield number and record, and the line itself if it may be kept unchanged."""
    blocks = chunk.records
    if isinstance(blocks, Block):
        blocks = [blocks]
    for block in blocks:
        if not isinstance(block, Block):
            yield *block, None
        elif keep and isinstance(block.lines, bytes):
            lines = block.lines.split(b"\n")
            for number, item in records_in(block):
                yield number, item, lines[number - block.line]
        else:
            for number, item in records_in(block):
                yield number, item, None


def _judge(read: list[_Read], place: int, question: Question, form: Requirements) -> None:
    """Fill in the problems and the examples of each record."""
    texts: list[_Read] = []
    conversations: list[tuple[_Read, Conversation]] = []
    for entry in read:
        entry.problems = [problem for problem in rules.problems(entry.record, form) if problem.rule not in question.allowed]
        if isinstance(entry.record, Conversation):
            _stop_where_there_is_no_form(entry, entry.record, place, question)
        if any(problem.rule not in _STILL_TOKENISED for problem in entry.problems):
            continue
        if isinstance(entry.record, str):
            texts.append(entry)
        else:
            conversations.append((entry, entry.record))
    results = conversation_to_tokens.examples_batch([record for _, record in conversations], question.template, question.tokenizer)
    for (entry, _), result in zip(conversations, results, strict=True):
        if isinstance(result, Problem):
            entry.problems.append(result)
        elif isinstance(result, ValueError):
            entry.problems.append(Problem("refused", str(result), "change or drop it"))
        else:
            entry.examples = result
    numbered = ((Origin(0, i), {"text": entry.record}) for i, entry in enumerate(texts))
    text = config.TextRecord(name="text")
    for (_, i), examples in encode(numbered, str, text, question.tokenizer, None):
        texts[i].examples = examples
    if question.seq_len is not None:
        for entry in read:
            longest = max((len(example.tokens) - 1 for example in entry.examples), default=0)
            if longest > question.seq_len and entry.section.too_long == "error" and "too-long" not in question.allowed:
                message = f"the record takes {longest} positions, the sequence has {question.seq_len}"
                entry.problems.append(Problem("too-long", message, "raise seq_len, set record.too_long, or shorten it"))


def _stop_where_there_is_no_form(entry: _Read, conversation: Conversation, place: int, question: Question) -> None:
    """Raise Stop for a conversation without a chat template, or with tools that the tokenizer or template cannot represent."""
    if isinstance(question.tokenizer, HuggingFace) and question.template is None:
        message = f"the record is a conversation, and the tokenizer {question.tokenizer.files[0]} has no chat template"
        raise Stop(place, entry.number, message, "name a jinja file with --chat-template (in a config: data.chat_template)")
    if not any(problem.rule == "type" for problem in entry.problems) and uses_tools(conversation):
        try:
            conversation_to_tokens.check_has_tools(question.template, question.tokenizer)
        except Problem as problem:
            raise Stop(place, entry.number, problem.message, problem.remedy) from problem


def _shape(entry: _Read) -> str:
    """Return the kind of a record, and whether it has tools."""
    if isinstance(entry.record, str):
        return "text"
    with_tools = entry.record.tools or any("tool_calls" in m or m.get("role") == "tool" for m in entry.record.messages)
    if with_tools:
        return f"{entry.section.name} with tools"
    return entry.section.name


def _sums(tokens: list[int], merged: MergedTurns) -> Counter[str]:
    """Return what an example of turns with tools adds to `Findings.merged`."""
    return Counter(examples=1, turns=len(merged.ends), tokens=len(tokens), separate_tokens=merged.separate_tokens)


def _loss_tokens(example: Example) -> int:
    """Return the number of ids that are trained on; the first id is never predicted."""
    if example.loss_mask is None:
        return len(example.tokens) - 1
    return sum(example.loss_mask[1:])


def _content(record: str | Conversation) -> str:
    """Return a text that is equal only for exact duplicates."""
    if isinstance(record, str):
        return record
    return json.dumps(record, sort_keys=True, default=str)


# --- putting right ---------------------------------------------------------------------------------------------


def _repaired(
    read: list[_Read],
    unreadable: list[tuple[int, Problem]],
    raw: dict[int, bytes],
    place: int,
    question: Question,
    form: Requirements,
) -> Kept:
    """Return every good record unchanged, and the other records corrected or dropped."""
    changes = [Change(number, "dropped", problem.rule, problem.message) for number, problem in unreadable]
    lines: dict[int, bytes] = {}
    repaired: list[_Read] = []
    repairs: dict[int, list[tuple[str, str]]] = {}
    for entry in read:
        if not entry.problems:
            line = raw.get(entry.number)
            if line is not None:
                lines[entry.number] = line.removeprefix(BOM).strip()
            else:
                lines[entry.number] = _line(entry.fields)
            continue
        record, repairs[entry.number] = rules.repair(entry.record, form)
        if repairs[entry.number] and (isinstance(record, str) or record.messages):
            repaired.append(_Read(entry.number, entry.fields, entry.section, record))
        else:
            reason = "nothing is left of it"
            if not repairs[entry.number]:
                reason = "; ".join(problem.message for problem in entry.problems)
            changes.append(Change(entry.number, "dropped", entry.problems[0].rule, reason))
    _judge(repaired, place, question, form)
    for entry in repaired:
        if entry.problems:
            reason = "; ".join(problem.message for problem in entry.problems)
            changes.append(Change(entry.number, "dropped", entry.problems[0].rule, reason))
            continue
        changes += [Change(entry.number, "changed", rule, change) for rule, change in repairs[entry.number]]
        if isinstance(entry.record, str):
            fields = {**entry.fields, _column(entry): entry.record}
        else:
            fields = denormalise(entry.fields, entry.record, entry.section)
        lines[entry.number] = _line(fields)
    return Kept(b"".join(lines[number] + b"\n" for number in sorted(lines)), len(lines), sorted(changes, key=lambda c: c.number))


def _column(entry: _Read) -> str:
    """Return the column that contains the text."""
    assert isinstance(entry.section, config.TextRecord)
    return entry.section.column


def _line(fields: dict[str, Any]) -> bytes:
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
