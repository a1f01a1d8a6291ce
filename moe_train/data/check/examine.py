"""Examine a chunk of records: find their problems, tokens and fingerprints, and correct them.

The findings depend only on the chunk, so any process can examine it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from moe_train import config
from moe_train.data.chat import conversation_to_tokens
from moe_train.data.chat.classified_to_tokens import classified_example
from moe_train.data.chat.encode import encode
from moe_train.data.chat.example import Example, fitting_tokens
from moe_train.data.chat.pairs_to_tokens import pair_examples_batch
from moe_train.data.check import rules
from moe_train.data.check.findings import (
    Change,
    Chunk,
    CorrectedChunk,
    Findings,
    KindCount,
    Question,
    ReadRecord,
)
from moe_train.data.check.kinds import kind_of
from moe_train.data.check.media_content import fingerprints_of
from moe_train.data.check.ngrams import words
from moe_train.data.check.overlap import compared_text, overlap
from moe_train.data.check.redacted import search_personal_data
from moe_train.data.check.repaired import attempts, corrected_chunk
from moe_train.data.check.requirements import Requirements
from moe_train.data.media import MediaRules
from moe_train.data.records.conversation import read as read_record
from moe_train.data.records.conversation import read_columns
from moe_train.data.records.json_lines import Block, records_in
from moe_train.data.records.media import locate_media
from moe_train.data.records.normal_form import (
    ClassifiedText,
    Conversation,
    LabelledAnswer,
    PreferencePair,
    messages_of,
    tools_of,
)
from moe_train.data.records.problem import Item, Problem, check_usable
from moe_train.data.records.recognise import recognise
from moe_train.data.records.source import Origin
from moe_train.data.records.unread import count
from moe_train.data.sound.rules import SoundRules
from moe_train.data.tokenizers.tokenizer import Tokenizer

_FAULTS_OF_TEMPLATES = {"template", "no-template", "tools"}  # no reason to drop a record: another template may render it
_STILL_TOKENISED = {"control-token", "empty-user", "reasoning-as-text"}  # training accepts records that break these rules


class _ReadChunk(NamedTuple):
    """The records of a chunk."""

    read: list[ReadRecord]
    unreadable: list[tuple[int, Problem]]
    """(line, row or byte; problem) for each record that cannot be read."""
    raw: dict[int, bytes]
    """The lines of records that are lines, by their numbers, if records are corrected."""


@dataclass
class _ExampleCounts:
    """Counts of the examples of a chunk; see `Findings`."""

    lengths: Counter[tuple[str, int]] = field(default_factory=Counter)
    loss_tokens: int = 0
    fitting: Counter[tuple[str, int, int]] = field(default_factory=Counter)
    merged: Counter[str] = field(default_factory=Counter)
    restarts: Counter[str] = field(default_factory=Counter)
    pictures: Counter[int] = field(default_factory=Counter)
    sound: Counter[int] = field(default_factory=Counter)

    def add_media(self, example: Example, rules: MediaRules | None) -> None:
        """Count the tokens of each picture, or of each clip of sound, of an example."""
        if example.media:
            assert rules is not None  # by which the pictures or the sound became tokens
            sizes = self.sound if isinstance(rules, SoundRules) else self.pictures
            sizes.update(rules.sizes_in(example.tokens))

    def add(self, kind: str, example: Example, seq_len: int | None) -> None:
        """Count an example.

        Args:
            kind: The kind of its record.
            example: The example.
            seq_len: Positions in a row; None if unknown.
        """
        # As if the example had one segment, whose last id takes no position.
        num_ids = example.num_positions + 1
        self.lengths[kind, num_ids] += 1
        self.loss_tokens += _loss_tokens(example)
        merged = example.merged
        if merged is None:
            return
        self.merged += Counter(examples=1, turns=len(merged.ends), tokens=num_ids, separate_tokens=merged.separate_tokens)
        if merged.restart:
            self.restarts[merged.restart] += 1
        # A row of n positions holds n + 1 ids: the last one is only predicted.
        num_fitting = fitting_tokens(merged, (seq_len or num_ids) + 1)
        if 0 < num_fitting < num_ids:
            self.fitting[kind, num_ids, num_fitting] += 1


def examine(chunk: Chunk, question: Question, form: Requirements) -> Findings:
    """Examine a chunk.

    Args:
        chunk: The records.
        question: What to examine.
        form: The form of records that the tokenizer requires (see `requirements_of`).
    """
    records = _read_chunk(chunk, question)
    searched = search_personal_data(records.read, records.raw, question)
    records = _ReadChunk(searched.read, records.unreadable + searched.unreadable, records.raw)
    _judge(records.read, question, form)
    problems = records.unreadable + searched.problems
    counts = _ExampleCounts()
    unread: Counter[str] = Counter()
    for entry in records.read:
        count(unread, entry.unread)
        problems += [(entry.number, problem) for problem in entry.problems]
        for example in entry.examples:
            counts.add(entry.section.name, example, question.seq_len)
            counts.add_media(example, question.tokenizer.media)
    texts = words([compared_text(entry.record) for entry in records.read])
    overlapping, held_out = overlap(texts, question.held_out)
    numbers = np.array([entry.number for entry in records.read], np.int64)
    return Findings(
        place=chunk.place,
        num_records=len(records.read) + len(records.unreadable),
        shapes=Counter(_shape(entry) for entry in records.read),
        kinds=_kinds(records.read),
        unread=unread,
        # By number alone: problems cannot be compared, and those of one record keep their order.
        problems=sorted(problems, key=operator.itemgetter(0)),
        lengths=counts.lengths,
        loss_tokens=counts.loss_tokens,
        fitting=counts.fitting,
        merged=counts.merged,
        restarts=counts.restarts,
        pictures=counts.pictures,
        sound=counts.sound,
        numbers=numbers,
        prints=fingerprints_of([entry.record for entry in records.read], texts),
        overlapping=numbers[overlapping],
        held_out=held_out,
        corrected=_corrected(records, question, form, searched.changes) if question.repairing else None,
    )


def _read_chunk(chunk: Chunk, question: Question) -> _ReadChunk:
    """Read the records of a chunk, without judging them."""
    records = _ReadChunk([], [], {})
    for number, item, line in _items(chunk, keep=question.repairing):
        if line is not None:
            records.raw[number] = line
        if isinstance(item, Problem):
            records.unreadable.append((number, item))
            continue
        try:
            section = question.records[chunk.place] or question.with_effort(recognise(item, question.ignore))
            check_usable(item, read_columns(section))
            normal, unread = read_record(item, section)
            locate_media(normal, question.folder(chunk.place))
            records.read.append(ReadRecord(number, item, section, normal, unread))
        except Problem as problem:
            records.unreadable.append((number, problem))
    return records


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
                # `block.line` is the number of the block's first line.
                yield number, item, lines[number - block.line]
        else:
            for number, item in records_in(block):
                yield number, item, None


def _judge(read: list[ReadRecord], question: Question, form: Requirements) -> None:
    """Fill in the problems and the examples of each record."""
    texts: list[ReadRecord] = []
    conversations: list[tuple[ReadRecord, Conversation]] = []
    judged: list[tuple[ReadRecord, PreferencePair | LabelledAnswer]] = []
    for entry in read:
        entry.problems = [problem for problem in rules.problems(entry.record, form) if problem.rule not in question.allowed]
        # Encoding a record that breaks a rule would only report the same fault again, less clearly.
        if any(problem.rule not in _STILL_TOKENISED for problem in entry.problems):
            continue
        if isinstance(entry.record, ClassifiedText):
            try:
                entry.examples = [classified_example(entry.record, question.template, question.tokenizer)]
            except ValueError as error:
                refused = error if isinstance(error, Problem) else Problem("refused", str(error), "change or drop it")
                entry.problems.append(refused)
        elif isinstance(entry.record, str):
            texts.append(entry)
        elif isinstance(entry.record, Conversation):
            conversations.append((entry, entry.record))
        else:
            judged.append((entry, entry.record))
    # One call for all conversations, since a chat template is rendered in a sandbox that is entered once for a batch.
    results = conversation_to_tokens.examples_batch([record for _, record in conversations], question.template, question.tokenizer)
    results += pair_examples_batch([record for _, record in judged], question.template, question.tokenizer)
    entries = [entry for entry, _ in (*conversations, *judged)]
    for entry, result in zip(entries, results, strict=True):
        if isinstance(result, Problem):
            entry.problems.append(result)
        elif isinstance(result, ValueError):
            entry.problems.append(Problem("refused", str(result), "change or drop it"))
        else:
            entry.examples = result
    _encode_texts(texts, question.tokenizer)
    if question.seq_len is not None and "too-long" not in question.allowed:
        for entry in read:
            _judge_length(entry, question.seq_len)


def _judge_length(entry: ReadRecord, seq_len: int) -> None:
    """Add a problem to a record with an example that is longer than a row, if training would stop there."""
    longest = max((example.num_positions for example in entry.examples), default=0)
    if longest > seq_len and entry.section.too_long == "error":
        message = f"the record takes {longest} positions, the sequence has {seq_len}"
        remedy = "raise --seq-len (in a config: train.seq_len), set record.too_long there, or shorten it"
        entry.problems.append(Problem("too-long", message, remedy))


def _encode_texts(texts: list[ReadRecord], tokenizer: Tokenizer) -> None:
    """Fill in the examples of texts, or a problem where the tokenizer refuses one."""
    section = config.TextRecord(name="text")
    numbered = [(Origin(0, i), {"text": entry.record}) for i, entry in enumerate(texts)]
    try:
        for (_, i), examples in encode(numbered, str, section, tokenizer, None):
            texts[i].examples = examples
    except ValueError:
        for entry, record in zip(texts, numbered, strict=True):  # find the one at fault
            try:
                [(_, entry.examples)] = encode([record], str, section, tokenizer, None)
            except ValueError as error:
                # The cause, since `encode` puts a location before its message, which here would be a mere index.
                cause = error.__cause__
                entry.problems.append(cause if isinstance(cause, Problem) else Problem("refused", str(cause), "change or drop it"))


def _shape(entry: ReadRecord) -> str:
    """Return the kind of a record, and whether it has tools."""
    messages = messages_of(entry.record)
    if tools_of(entry.record) or any("tool_calls" in message or message.get("role") == "tool" for message in messages):
        return f"{entry.section.name} with tools"
    return entry.section.name


def _kinds(read: list[ReadRecord]) -> dict[str, KindCount]:
    """Return the first record and the numbers of records of each kind, which is a section in words."""
    counts: dict[str, KindCount] = {}
    for entry in read:
        kind = kind_of(entry.section)
        first, records, without_problems = counts.get(kind, KindCount(entry.number, 0, 0))
        counts[kind] = KindCount(first, records + 1, without_problems + (not entry.problems))
    return counts


def _corrected(records: _ReadChunk, question: Question, form: Requirements, redactions: list[Change]) -> CorrectedChunk:
    """Return the corrected chunk, of which `redactions` states the changes that were made before."""
    repaired, reasons = attempts(records.read, form)
    _judge([attempt.entry for attempt in repaired.values()], question, form)
    for attempt in repaired.values():  # what training accepts is no reason to give a repair up
        attempt.entry.problems = [problem for problem in attempt.entry.problems if problem.rule not in _STILL_TOKENISED]
    accepted = [entry.number for entry in records.read if entry.problems and _accepted(entry, question)]
    chunk = corrected_chunk(records.read, records.unreadable, records.raw, repaired, reasons, accepted)
    dropped = {change.number for change in chunk.changes if change.action == "dropped"}
    made = [change for change in redactions if change.number not in dropped]
    return chunk._replace(changes=sorted([*chunk.changes, *made], key=operator.attrgetter("number")))


def _accepted(entry: ReadRecord, question: Question) -> bool:
    """Return whether a record with problems is kept: training accepts it and learns from it, or the fault is not the record's."""
    if all(problem.rule in _FAULTS_OF_TEMPLATES for problem in entry.problems):
        return True
    if any(problem.rule == "too-long" for problem in entry.problems):
        return False
    if isinstance(entry.record, Conversation):
        (result,) = conversation_to_tokens.examples_batch([entry.record], question.template, question.tokenizer)
        return not isinstance(result, ValueError)
    return isinstance(entry.record, str) and bool(entry.record)


def _loss_tokens(example: Example) -> int:
    """Return the number of ids that are trained on; the first id is never predicted."""
    if example.loss_mask is None:
        return len(example.tokens) - 1
    return sum(example.loss_mask[1:])
