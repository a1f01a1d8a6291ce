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
from moe_train.data.chat.example import Example, uses_tools
from moe_train.data.check import rules
from moe_train.data.check.duplicates import Fingerprints, fingerprints
from moe_train.data.check.form import Form
from moe_train.data.check.ngrams import words
from moe_train.data.check.overlap import overlap, said_in
from moe_train.data.records.conversation import Conversation, denormalise, normalise, recognise
from moe_train.data.records.file_bytes import BOM
from moe_train.data.records.json_lines import Block, records_in
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


def examine(chunk: Chunk, question: Question, form: Form) -> Findings:
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
    problems = unreadable + [(one.number, problem) for one in read for problem in one.problems]
    lengths: Counter[tuple[str, int]] = Counter((one.section.name, len(example.tokens)) for one in read for example in one.examples)
    texts = words([said_in(one.record) for one in read])
    overlapping, held_out = overlap(texts, question.held_out)
    numbers = np.array([one.number for one in read], np.int64)
    return Findings(
        place=chunk.place,
        num_records=num_records,
        shapes=Counter(_shape(one) for one in read),
        problems=sorted(problems, key=lambda pair: pair[0]),
        lengths=lengths,
        loss_tokens=sum(_loss_tokens(example) for one in read for example in one.examples),
        numbers=numbers,
        prints=fingerprints([_content(one.record) for one in read], texts),
        overlapping=numbers[overlapping],
        held_out=held_out,
        kept=_repaired(read, unreadable, raw, chunk.place, question, form) if question.repairing else None,
    )


def _items(chunk: Chunk, keep: bool) -> Iterator[tuple[int, Item, bytes | None]]:
    """Yield number and record, and the line itself if it may be kept unchanged."""
    blocks = [chunk.records] if isinstance(chunk.records, Block) else chunk.records
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


def _judge(read: list[_Read], place: int, question: Question, form: Form) -> None:
    """Fill in the problems and the examples of each record."""
    texts: list[_Read] = []
    conversations: list[tuple[_Read, Conversation]] = []
    for one in read:
        one.problems = [problem for problem in rules.problems(one.record, form) if problem.rule not in question.allowed]
        if isinstance(one.record, Conversation):
            _stop_where_there_is_no_form(one, one.record, place, question)
        if any(problem.rule not in _STILL_TOKENISED for problem in one.problems):
            continue
        if isinstance(one.record, str):
            texts.append(one)
        else:
            conversations.append((one, one.record))
    made = conversation_to_tokens.examples_batch([record for _, record in conversations], question.template, question.tokenizer)
    for (one, _), found in zip(conversations, made, strict=True):
        if isinstance(found, ValueError):
            one.problems.append(found if isinstance(found, Problem) else Problem("refused", str(found), "change or drop it"))
        else:
            one.examples = found
    numbered = ((Origin(0, i), {"text": one.record}) for i, one in enumerate(texts))
    text = config.TextRecord(name="text")
    for (_, i), examples in encode(numbered, str, text, question.tokenizer, None):
        texts[i].examples = examples
    if question.seq_len is not None:
        for one in read:
            longest = max((len(example.tokens) - 1 for example in one.examples), default=0)
            if longest > question.seq_len and one.section.too_long == "error" and "too-long" not in question.allowed:
                what = f"the record takes {longest} positions, the sequence has {question.seq_len}"
                one.problems.append(Problem("too-long", what, "raise seq_len, set record.too_long, or shorten it"))


def _stop_where_there_is_no_form(one: _Read, conversation: Conversation, place: int, question: Question) -> None:
    """Raise Stop for a conversation without a chat template, or with tools that the tokenizer or template cannot represent."""
    if isinstance(question.tokenizer, HuggingFace) and question.template is None:
        what = f"the record is a conversation, and the tokenizer {question.tokenizer.files[0]} has no chat template"
        raise Stop(place, one.number, what, "name a jinja file with --chat-template (in a config: data.chat_template)")
    if not any(problem.rule == "type" for problem in one.problems) and uses_tools(conversation):
        try:
            conversation_to_tokens.check_has_tools(question.template, question.tokenizer)
        except Problem as problem:
            raise Stop(place, one.number, problem.message, problem.remedy) from problem


def _shape(one: _Read) -> str:
    """Return the kind of a record, and whether it has tools."""
    if isinstance(one.record, str):
        return "text"
    with_tools = one.record.tools or any("tool_calls" in m or m.get("role") == "tool" for m in one.record.messages)
    return f"{one.section.name} with tools" if with_tools else one.section.name


def _loss_tokens(example: Example) -> int:
    """Return the number of ids that are trained on; the first id is never predicted."""
    return len(example.tokens) - 1 if example.loss_mask is None else sum(example.loss_mask[1:])


def _content(record: str | Conversation) -> str:
    """Return a text that is equal only for exact duplicates."""
    return record if isinstance(record, str) else json.dumps(record, sort_keys=True, default=str)


# --- putting right ---------------------------------------------------------------------------------------------


def _repaired(
    read: list[_Read],
    unreadable: list[tuple[int, Problem]],
    raw: dict[int, bytes],
    place: int,
    question: Question,
    form: Form,
) -> Kept:
    """Return every good record unchanged, and the other records corrected or dropped."""
    changes = [Change(number, "dropped", problem.rule, problem.message) for number, problem in unreadable]
    lines: dict[int, bytes] = {}
    tried: list[_Read] = []
    done: dict[int, list[tuple[str, str]]] = {}
    for one in read:
        if not one.problems:
            line = raw.get(one.number)
            lines[one.number] = line.removeprefix(BOM).strip() if line is not None else _line(one.fields)
            continue
        record, done[one.number] = rules.repair(one.record, form)
        if done[one.number] and (isinstance(record, str) or record.messages):
            tried.append(_Read(one.number, one.fields, one.section, record))
        else:
            cut = "nothing is left of it" if done[one.number] else "; ".join(problem.message for problem in one.problems)
            changes.append(Change(one.number, "dropped", one.problems[0].rule, cut))
    _judge(tried, place, question, form)
    for one in tried:
        if one.problems:
            what = "; ".join(problem.message for problem in one.problems)
            changes.append(Change(one.number, "dropped", one.problems[0].rule, what))
            continue
        changes += [Change(one.number, "changed", rule, what) for rule, what in done[one.number]]
        fields = (
            {**one.fields, _column(one): one.record}
            if isinstance(one.record, str)
            else denormalise(one.fields, one.record, one.section)
        )
        lines[one.number] = _line(fields)
    return Kept(b"".join(lines[number] + b"\n" for number in sorted(lines)), len(lines), sorted(changes, key=lambda c: c.number))


def _column(one: _Read) -> str:
    """Return the column that contains the text."""
    assert isinstance(one.section, config.TextRecord)
    return one.section.column


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
