"""`moe-train classify`: scores of the texts of a file by a classifier or a reward model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_train import config
from moe_train.commands.text_scorer import NamedText, TextScorer
from moe_train.data.records.messages import PLAIN, read_messages
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem, checked_text
from moe_train.data.records.read_each import read_each, refuse_unread
from moe_train.data.records.tools import take_tools
from moe_train.data.records.unread import Unread
from moe_train.evaluate.scores import outputs_of, predicted, probabilities
from moe_train.machine.files import JsonObject


class _Entry(NamedTuple):
    """A line of the file."""

    id: Any
    """The id of the text; None if it has none."""
    text: NamedText


def classify(directory: Path, file: Path, chat_template: str | None = None) -> Iterator[JsonObject]:
    """Score the texts of a file, and yield one result for each, in their order.

    Args:
        directory: a run or model with a head for classification or rewards.
        file: JSON lines with `text` or `messages` (and `tools`, `id`); `labels` are not read.
        chat_template: a jinja file, its text, or a name; None for the template of the run or of the model's tokenizer.

    Yields:
        location or id, and for a classifier `labels`, {target: label or list of labels}, and `scores`, {target: {label:
        probability}}; for a reward model `reward`.

    Raises:
        FileNotFoundError: there is no such file or model.
        ValueError: with file and line, for a text that cannot be scored; or the model has no head for scores.
    """
    entries = read_each(file, "text", "text", _entry)
    scorer = TextScorer(directory, chat_template)
    scores_NY = scorer.score([entry.text for entry in entries])
    for entry, scores_Y in zip(entries, scores_NY, strict=True):
        result: JsonObject = {"location": entry.text.location} if entry.id is None else {"id": entry.id}
        yield result | described(scorer.head, scores_Y)


def described(head: config.ScoreHead, scores_Y: np.ndarray) -> JsonObject:
    """Return the labels and probabilities of one text, or its reward."""
    if not head.targets:
        return {"reward": round(float(scores_Y[0]), 6)}
    labels: JsonObject = {}
    scores: JsonObject = {}
    for target, outputs in outputs_of(head):
        chances_1Y = probabilities(target, scores_Y[None, outputs])
        chosen = [label for label, is_chosen in zip(target.labels, predicted(target, chances_1Y)[0], strict=True) if is_chosen]
        labels[target.name] = chosen if target.several else chosen[0]
        scores[target.name] = {label: round(float(p), 6) for label, p in zip(target.labels, chances_1Y[0], strict=True)}
    return {"labels": labels, "scores": scores}


def _entry(remaining: dict[str, Any], location: str) -> _Entry:
    unread = Unread()
    entry_id = remaining.pop("id", None)
    # A file of labelled records can be scored as it is.
    remaining.pop("labels", None)
    if ("text" in remaining) == ("messages" in remaining):
        raise Problem("columns", "the record needs either text or messages", "write one of them")
    content: str | Conversation
    if "text" in remaining:
        content = checked_text(remaining.pop("text"), "text")
    else:
        messages = read_messages(remaining.pop("messages"), "messages", PLAIN, unread)
        content = Conversation(messages, take_tools(remaining, unread))
    refuse_unread(remaining, unread, "a record has text or messages, tools, id, labels")
    return _Entry(entry_id, NamedText(content, location))
