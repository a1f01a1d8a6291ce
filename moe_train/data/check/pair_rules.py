"""Rules for preference pairs and labelled answers, beyond those for the conversations that they consist of."""

from __future__ import annotations

from collections.abc import Iterator

from moe_train.data.records.normal_form import LabelledAnswer, Message, PreferencePair
from moe_train.data.records.problem import Problem


def pair_problems(record: PreferencePair | LabelledAnswer) -> Iterator[Problem]:
    """Yield the problems of a pair that none of its conversations has."""
    if isinstance(record, LabelledAnswer):
        return
    for name, answer in (("chosen", record.chosen), ("rejected", record.rejected)):
        if not answer:
            yield Problem("pair", f"{name} has no message after the prompt", "write the answer")
    if record.chosen and _compared(record.chosen) == _compared(record.rejected):
        yield Problem("pair", "chosen and rejected are equal, so the pair prefers nothing", "drop the record")


def _compared(messages: list[Message]) -> list[Message]:
    """Return messages without what does not tell answers apart: what the loss covers, and spaces around a text."""
    compared = []
    for message in messages:
        copy = {key: value for key, value in message.items() if key not in ("weight", "pieces")}
        content = message.get("content")
        if isinstance(content, str):
            copy["content"] = content.strip()
        compared.append(copy)
    return compared
