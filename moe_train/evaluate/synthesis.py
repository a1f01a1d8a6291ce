"""Records for training from graded answers: of each question, what its answers become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from moe_train.data.records.normal_form import Message
from moe_train.evaluate.suites.answer import Answer
from moe_train.evaluate.suites.tool_calls import has_mark, split_answer
from moe_train.machine.files import JsonObject

RecordForm = Literal["sft", "pairs", "kto"]
"""`sft`: conversations that end with an accepted answer; `pairs`: an accepted answer and a worse one to the same question; `kto`:
every answer, marked as good or bad."""


class SampledAnswer(NamedTuple):
    """One of the answers to a question."""

    sample: int
    """Number of the answer among those to its question, from 0."""
    answer: Answer
    turn: Message | None
    """The assistant's turn that it is written as; None if no record can hold it (`turn_of`)."""


class SynthesizedRecord(NamedTuple):
    """A record, and the answers that it was made from."""

    fields: JsonObject
    """The record as it is written."""
    sources: tuple[SampledAnswer, ...]
    """The answers in it, an accepted one first."""


class AnswerCounts(NamedTuple):
    """What became of the answers to all questions."""

    accepted: int
    """Answers whose score is high enough."""
    rejected: int
    """Answers whose score is not."""
    repeated: int
    """Answers with the same text and calls as an earlier one to the same question; they are not used again."""
    unfinished: int
    """Answers that were cut off at the most tokens; a model should not learn to write them, nor from where they were cut."""
    empty: int
    """Answers without text and calls."""
    not_written: int
    """Answers that no record can hold as they are, such as a call that does not end, or text behind a call."""
    not_graded: int
    """Answers that the grader could not score."""


class Sorted(NamedTuple):
    """The usable answers to one question, the best first, and counts of the others."""

    accepted: list[SampledAnswer]
    rejected: list[SampledAnswer]
    counts: AnswerCounts


def sort_answers(answers: Sequence[SampledAnswer], min_score: float) -> Sorted:
    """Sort the answers to one question into accepted and rejected ones, and leave out what cannot be learned from."""
    accepted: list[SampledAnswer] = []
    rejected: list[SampledAnswer] = []
    turns: list[Message] = []
    repeated = unfinished = empty = not_written = not_graded = 0
    for sampled in answers:
        score = sampled.answer.score
        if not sampled.answer.text.strip():
            empty += 1
        elif not sampled.answer.finished:
            unfinished += 1
        elif score is None:
            not_graded += 1
        elif sampled.turn is None:
            not_written += 1
        elif sampled.turn in turns:
            repeated += 1
        else:
            turns.append(sampled.turn)
            (accepted if score >= min_score else rejected).append(sampled)
    counts = AnswerCounts(len(accepted), len(rejected), repeated, unfinished, empty, not_written, not_graded)
    # Stable, so that of equally good answers the one that was sampled first comes first.
    return Sorted(sorted(accepted, key=_negative_score), sorted(rejected, key=_negative_score), counts)


def _negative_score(sampled: SampledAnswer) -> float:
    assert sampled.answer.score is not None  # others were left out
    return -sampled.answer.score


def records_of(
    form: RecordForm, question: Sequence[Message], tools: Sequence[JsonObject], graded: Sorted
) -> list[SynthesizedRecord]:
    """Return the records that the answers to one question become.

    Pairs join the best answer with the worst, the second best with the second worst, and so on; each answer is in one pair.

    Args:
        form: the kind of records.
        question: the messages of the question.
        tools: its tools.
        graded: its answers.
    """
    shared: JsonObject = {"tools": list(tools)} if tools else {}
    match form:
        case "sft":
            records = []
            for sampled in graded.accepted:
                records.append(SynthesizedRecord({"messages": [*question, sampled.turn], **shared}, (sampled,)))
            return records
        case "kto":
            records = []
            for sampled, label in [*((s, True) for s in graded.accepted), *((s, False) for s in graded.rejected)]:
                fields: JsonObject = {"prompt": list(question), "completion": [sampled.turn], "label": label, **shared}
                records.append(SynthesizedRecord(fields, (sampled,)))
            return records
        case "pairs":
            records = []
            for chosen, rejected in zip(graded.accepted, reversed(graded.rejected), strict=False):
                pair: JsonObject = {"prompt": list(question), "chosen": [chosen.turn], "rejected": [rejected.turn], **shared}
                records.append(SynthesizedRecord(pair, (chosen, rejected)))
            return records


def turn_of(text: str, plain: str) -> Message | None:
    """Return the assistant's turn that an answer is written as; None if no turn is rendered as the answer was.

    Args:
        text: The answer with control tokens written by name. Calls behind a mark become `tool_calls`; an answer that is nothing
            but JSON stays text.
        plain: The answer without control tokens.
    """
    # Without white space at the ends, which a chat format does not keep in every place.
    content = text.strip()
    if not has_mark(text):
        # A control token other than those of calls has no place in a text.
        return {"role": "assistant", "content": content} if content == plain.strip() else None
    try:
        parts = split_answer(text)
    except ValueError:
        return None
    content = parts.content.strip()
    if not parts.calls or parts.rest.strip() or not plain.strip().startswith(content):
        return None
    calls = [{"type": "function", "function": call._asdict()} for call in parts.calls]
    return {"role": "assistant", "content": content, "tool_calls": calls}
