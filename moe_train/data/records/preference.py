"""Preference pairs, and answers that are labelled as good or bad, in the spellings of TRL, axolotl, ms-swift and LLaMA-Factory."""

from __future__ import annotations

import math
from typing import Any

from moe_train import config
from moe_train.data.records.completion import messages_in, read_answer, take, take_prompt, with_system
from moe_train.data.records.messages import PLAIN, read_messages
from moe_train.data.records.normal_form import Conversation, Message, PreferencePair
from moe_train.data.records.problem import Problem, brief
from moe_train.data.records.settings import take_settings
from moe_train.data.records.tools import json_value, take_tools
from moe_train.data.records.unread import Unread

_LABELS = {"true": True, "false": False}


def read_pair(remaining: dict[str, Any], record: config.PreferenceRecord, unread: Unread) -> PreferencePair:
    """Read a preference pair; what is read is taken out of `remaining`.

    Raises:
        Problem: If a value cannot be interpreted, or an answer does not begin with the prompt.
    """
    _open_request(remaining, record.prompt)
    tools = take_tools(remaining, unread)
    settings = take_settings(remaining, record)
    # Both answers are in one column, with ranks.
    if record.chosen == record.rejected:
        prompt = take_prompt(remaining, str(record.prompt), unread, weight=None)
        values = _best_two(take(remaining, record.chosen), record.chosen, unread)
    elif record.chosen == record.prompt:  # the messages end with the chosen answer
        messages = read_messages(take(remaining, record.chosen), record.chosen, PLAIN, unread)
        prompt = with_system(remaining, messages[:-1])
        values = messages[-1:], take(remaining, record.rejected)
    else:
        values = take(remaining, record.chosen), take(remaining, record.rejected)
        if record.prompt is None:
            pair = _without_prompt(values, record, Conversation([], tools, settings), unread)
            messages = with_system(remaining, pair.prompt.messages)
            return pair._replace(prompt=pair.prompt._replace(messages=messages))
        # None leaves weights alone: the answers may repeat the prompt, and must compare equal to it.
        prompt = take_prompt(remaining, record.prompt, unread, weight=None)
    answers = []
    for column, value in zip((record.chosen, record.rejected), values, strict=True):
        answers.append(read_answer(value, column, bool(tools), unread))
    prompt, chosen, rejected = _without_repeated_prompt(prompt, *answers)
    return PreferencePair(Conversation(prompt, tools, settings), chosen, rejected)


def _open_request(remaining: dict[str, Any], column: str | None) -> None:
    """Take a request of OpenAI's preference format, {messages, tools, …}, apart into columns.

    Raises:
        Problem: If the record has one of its keys as a column, too.
    """
    if column is None:
        return
    request = remaining.get(column)
    if not isinstance(request, dict) or "messages" not in request:
        return
    for name, value in request.items():
        if name == "messages":
            remaining[column] = value
        elif name in remaining:
            raise Problem("columns", f"the record has {name} as a column and in {column}", "keep the one that is meant")
        elif value is not None:
            remaining[name] = value


def _is_rank(value: Any) -> bool:
    """Return whether a value is a rank: a number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _best_two(value: Any, column: str, unread: Unread) -> tuple[Any, Any]:
    """Return the answers of the best two ranks in a list of {answer, rank}."""
    remedy = 'write [{"answer": …, "rank": 1}, {"answer": …, "rank": 2}]'
    ranked = json_value(value, column, remedy)
    for entry in ranked if isinstance(ranked, list | tuple) else [ranked]:
        if not isinstance(entry, dict) or entry.get("answer") is None or not _is_rank(entry.get("rank")):
            raise Problem("type", f"{column} should be a list of answers with ranks, and has {brief(entry)}", remedy)
    if not isinstance(ranked, list | tuple) or len(ranked) < 2:
        raise Problem("pair", f"{column} has fewer than two answers", remedy)
    ordered = sorted(ranked, key=lambda entry: entry["rank"])
    # The third counts too: if it ties with the second, which of them is the rejected answer would be arbitrary.
    ranks = [entry["rank"] for entry in ordered[:3]]
    if len(set(ranks)) < len(ranks):
        raise Problem("pair", f"{column} has several answers of rank {brief(ranks[1])}", "give each answer its own rank")
    # Answers beyond the best two are noted as not read, together with any other key.
    for k, entry in enumerate(ordered):
        rest = {key: item for key, item in entry.items() if item is not None and (k >= 2 or key not in ("answer", "rank"))}
        unread.close(f"answer {k} of {column}", f"{column}.", rest)
    return ordered[0]["answer"], ordered[1]["answer"]


def _without_prompt(
    values: tuple[Any, Any], record: config.PreferenceRecord, prompt: Conversation, unread: Unread
) -> PreferencePair:
    """Read a pair without a prompt of its own: what both answers begin with is the prompt."""
    chosen, rejected = map(messages_in, values)
    if isinstance(chosen, str) and isinstance(rejected, str):
        size = _common(chosen, rejected)
        if 0 < size < min(len(chosen), len(rejected)) and chosen[size - 1] == " ":
            size -= 1  # a token begins with the space before its word
        if not chosen[:size].strip():
            raise Problem("pair", "the pair has no prompt, and its texts do not begin alike", "write the prompt as a column")
        messages = [{"role": "user", "content": chosen[:size]}]
        preferred, other = ([{"role": "assistant", "content": text[size:]}] for text in (chosen, rejected))
        return PreferencePair(prompt._replace(messages=messages), preferred, other)
    answers = [
        read_messages(value, column, PLAIN, unread) if not isinstance(value, dict) else read_answer(value, column, False, unread)
        for column, value in zip((record.chosen, record.rejected), (chosen, rejected), strict=True)
    ]
    size = _common(*answers)
    if not size:
        raise Problem("pair", "the pair has no prompt, and its conversations do not begin alike", "write the prompt as a column")
    return PreferencePair(prompt._replace(messages=answers[0][:size]), answers[0][size:], answers[1][size:])


def _common(first: Any, second: Any) -> int:
    """Return how many elements two sequences have in common at their starts; of equal sequences all but the last."""
    size = 0
    # Works for texts, by character, and for lists of messages alike.
    while size < min(len(first), len(second)) and first[size] == second[size]:
        size += 1
    if size == len(first) == len(second):
        size -= 1  # equal answers are found later, by a rule
    return max(size, 0)


def _without_repeated_prompt(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Take the prompt away from answers that are whole conversations.

    Returns:
        The prompt, with a system message that only the answers have, and both answers.

    Raises:
        Problem: If an answer is a conversation that does not begin with the prompt.
    """
    prompts: list[list[Message]] = []
    rests: list[list[Message]] = []
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        # An answer that begins with the assistant's turn does not repeat the prompt.
        if answer[0].get("role") not in ("system", "user"):
            prompts.append(prompt)
            rests.append(answer)
            continue
        size = _prompt_size(prompt, answer)
        if size is None:
            message = f"the pair is not about one prompt: {name} begins with other messages than the prompt"
            raise Problem("pair", message, "let both begin with the prompt, or only answer it")
        prompts.append(answer[:size])
        rests.append(answer[size:])
    # The longer one has the system message that the other lacks.
    whole = max(prompts, key=len)
    if any(one not in (whole, prompt) for one in prompts):
        message = "the pair is not about one prompt: chosen and rejected begin with different messages"
        raise Problem("pair", message, "let both begin with the prompt, or only answer it")
    return whole, rests[0], rests[1]


def _prompt_size(prompt: list[Message], answer: list[Message]) -> int | None:
    """Return how many messages of an answer repeat the prompt, after an optional system message; None if it does not."""
    for start in (0, 1):
        if answer[start : start + len(prompt)] == prompt and all(m.get("role") == "system" for m in answer[:start]):
            return start + len(prompt)
    return None


def is_label(value: Any) -> bool:
    """Return whether a value labels an answer as good or bad."""
    return isinstance(value, bool) or (isinstance(value, str) and value.lower() in _LABELS)


def take_label(remaining: dict[str, Any], column: str) -> bool:
    """Take the label out of a record. Raises Problem if it is neither true nor false."""
    value = take(remaining, column)
    if not is_label(value):
        raise Problem("type", f"column {column!r} should be true or false, not {brief(value)}", "write true or false")
    return value if isinstance(value, bool) else _LABELS[value.lower()]


def take_margin(remaining: dict[str, Any], column: str | None) -> float:
    """Take the margin out of a record; 0 without a column. Raises Problem if it is no number."""
    if column is None:
        return 0.0
    value = take(remaining, column)
    # A margin is a number as a rank is.
    if not _is_rank(value):
        raise Problem("type", f"column {column!r} should be a number, not {brief(value)}", "write how much better chosen is, or 0")
    return float(value)
