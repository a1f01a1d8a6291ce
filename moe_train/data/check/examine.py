"""Examine a chunk of records: find their problems, tokens and fingerprints, and correct them.

The findings depend only on the chunk, so any process can examine it.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator

import numpy as np

from moe_train import config
from moe_train.data.chat import conversation_to_tokens
from moe_train.data.chat.encode import encode
from moe_train.data.chat.example import Example, MergedTurns, fitting_tokens
from moe_train.data.check import rules
from moe_train.data.check.duplicates import fingerprints
from moe_train.data.check.findings import Chunk, Findings, Kept, KindCount, Question, ReadRecord
from moe_train.data.check.kinds import in_words
from moe_train.data.check.ngrams import words
from moe_train.data.check.overlap import overlap, said_in
from moe_train.data.check.pair_rules import no_objective
from moe_train.data.check.repaired import attempts, kept_of
from moe_train.data.check.requirements import Requirements
from moe_train.data.records.conversation import read as read_record
from moe_train.data.records.conversation import read_columns
from moe_train.data.records.json_lines import Block, records_in
from moe_train.data.records.normal_form import Conversation, NormalRecord, messages_of, tools_of
from moe_train.data.records.problem import Item, Problem, check_usable
from moe_train.data.records.recognise import recognise
from moe_train.data.records.source import Origin
from moe_train.data.records.unread import count
from moe_train.data.tokenizers.tokenizer import Tokenizer

_FAULTS_OF_TEMPLATES = {"template", "no-template", "tools"}  # no reason to drop a record: another template may render it
_STILL_TOKENISED = {"control-token"}  # training accepts records that break these rules, and treats the tokens as plain text


def examine(chunk: Chunk, question: Question, form: Requirements) -> Findings:
    """Examine a chunk.

    Args:
        chunk: The records.
        question: What to examine.
        form: The form of records for the tokenizer (see `form_of`).
    """
    read: list[ReadRecord] = []
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
            section = question.records[chunk.place] or recognise(item, question.ignore)
            check_usable(item, read_columns(section))
            read.append(ReadRecord(number, item, section, *read_record(item, section)))
        except Problem as problem:
            unreadable.append((number, problem))
    _judge(read, question, form)
    problems = list(unreadable)
    lengths: Counter[tuple[str, int]] = Counter()
    loss_tokens = 0
    fitting: Counter[tuple[str, int, int]] = Counter()
    merged: Counter[str] = Counter()
    restarts: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    for entry in read:
        count(unread, entry.unread)
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
        kinds=_kinds(read),
        unread=unread,
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
        kept=_kept(read, unreadable, raw, question, form) if question.repairing else None,
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


def _judge(read: list[ReadRecord], question: Question, form: Requirements) -> None:
    """Fill in the problems and the examples of each record."""
    texts: list[ReadRecord] = []
    conversations: list[tuple[ReadRecord, Conversation]] = []
    for entry in read:
        found = itertools.chain(rules.problems(entry.record, form), no_objective(entry.record))
        entry.problems = [problem for problem in found if problem.rule not in question.allowed]
        if any(problem.rule not in _STILL_TOKENISED for problem in entry.problems):
            continue
        if isinstance(entry.record, str):
            texts.append(entry)
        elif isinstance(entry.record, Conversation):
            conversations.append((entry, entry.record))
    results = conversation_to_tokens.examples_batch([record for _, record in conversations], question.template, question.tokenizer)
    for (entry, _), result in zip(conversations, results, strict=True):
        if isinstance(result, Problem):
            entry.problems.append(result)
        elif isinstance(result, ValueError):
            entry.problems.append(Problem("refused", str(result), "change or drop it"))
        else:
            entry.examples = result
    _encode_texts(texts, question.tokenizer)
    if question.seq_len is not None:
        for entry in read:
            longest = max((len(example.tokens) - 1 for example in entry.examples), default=0)
            if longest > question.seq_len and entry.section.too_long == "error" and "too-long" not in question.allowed:
                message = f"the record takes {longest} positions, the sequence has {question.seq_len}"
                entry.problems.append(
                    Problem(
                        "too-long",
                        message,
                        "raise --seq-len (in a config: train.seq_len), set record.too_long there, or shorten it",
                    )
                )


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
                entry.problems.append(Problem("refused", str(error.__cause__), "change or drop it"))


def _shape(entry: ReadRecord) -> str:
    """Return the kind of a record, and whether it has tools."""
    messages = messages_of(entry.record)
    if tools_of(entry.record) or any("tool_calls" in message or message.get("role") == "tool" for message in messages):
        return f"{entry.section.name} with tools"
    return entry.section.name


def _sums(tokens: list[int], merged: MergedTurns) -> Counter[str]:
    """Return what an example of turns with tools adds to `Findings.merged`."""
    return Counter(examples=1, turns=len(merged.ends), tokens=len(tokens), separate_tokens=merged.separate_tokens)


def _kinds(read: list[ReadRecord]) -> dict[str, KindCount]:
    """Return the first record and the numbers of records of each kind, which is a section in words."""
    counts: dict[str, KindCount] = {}
    for entry in read:
        kind = in_words(entry.section)
        first, records, without_problems = counts.get(kind, KindCount(entry.number, 0, 0))
        counts[kind] = KindCount(first, records + 1, without_problems + (not entry.problems))
    return counts


def _kept(
    read: list[ReadRecord],
    unreadable: list[tuple[int, Problem]],
    raw: dict[int, bytes],
    question: Question,
    form: Requirements,
) -> Kept:
    """Return the corrected chunk."""
    repaired, reasons = attempts(read, form)
    _judge([attempt.entry for attempt in repaired.values()], question, form)
    for attempt in repaired.values():  # what training accepts is no reason to give a repair up
        attempt.entry.problems = [problem for problem in attempt.entry.problems if problem.rule not in _STILL_TOKENISED]
    accepted = [entry.number for entry in read if entry.problems and _accepted(entry, question)]
    return kept_of(read, unreadable, raw, repaired, reasons, accepted)


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


def _content(record: NormalRecord) -> str:
    """Return a text that is equal only for exact duplicates."""
    if isinstance(record, str):
        return record
    return json.dumps(record, sort_keys=True, default=str)
