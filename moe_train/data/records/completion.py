"""Prompts and completions: one turn of each, with a system text, earlier turns, an input, a context and tools in other columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_train import config
from moe_train.data.records.messages import MESSAGE_COLUMNS, PLAIN, read_messages
from moe_train.data.records.normal_form import Conversation, Message
from moe_train.data.records.problem import NoColumn, Problem, brief
from moe_train.data.records.settings import take_settings
from moe_train.data.records.tool_call_text import read_tool_call_text
from moe_train.data.records.tool_calls import read_calls
from moe_train.data.records.tools import json_value, take_tools
from moe_train.data.records.unread import Unread, is_empty

SYSTEM_COLUMNS = ("system_prompt", "system", "system_message", "system_instruction")
"""Columns of a record that may hold its system text."""
MORE_PROMPT = ("input", "context")
"""Columns of a record that may hold more of its prompt."""
ANSWERS = "answers"
"""A column that holds calls, as xLAM has it, or several answers with their ranks."""


def read_completion(remaining: dict[str, Any], record: config.CompletionRecord, unread: Unread) -> Conversation:
    """Read a completion record; what is read is taken out of `remaining`.

    Raises:
        Problem: If a value cannot be interpreted.
    """
    # First, since text is read as calls only in a record with tools.
    tools = take_tools(remaining, unread)
    completion = take(remaining, record.completion)
    before = take_prompt(remaining, record.prompt, unread)
    answer = read_answer(completion, record.completion, bool(tools), unread)
    if record.completion == ANSWERS and any("tool_calls" not in message for message in answer):
        message = f"column {ANSWERS!r} should be a list of calls, not {brief(completion)}"
        raise Problem("arguments", message, "write the calls as JSON, or drop the record")
    messages = read_tool_call_text([*before, *answer], tools, unread)
    return Conversation(messages, tools, take_settings(remaining, record))


def take(remaining: dict[str, Any], column: str) -> Any:
    """Take the value of a column. Raises NoColumn if there is none."""
    if column not in remaining:
        raise NoColumn(column, list(remaining))
    return remaining.pop(column)


def take_prompt(remaining: dict[str, Any], column: str, unread: Unread, weight: int | None = 0) -> list[Message]:
    """Take the messages of a prompt: a system text, earlier turns and the question, or the messages of the column.

    Args:
        remaining: The columns that have not been read yet.
        column: The column of the prompt.
        unread: Takes the keys that are not read.
        weight: The weight of assistant messages in a prompt that is a list of messages; None to leave it as it is.
    """
    prompt = messages_in(take(remaining, column))
    if column not in MESSAGE_COLUMNS:
        _check_messages_or_text(prompt, column)
    if column in MESSAGE_COLUMNS or isinstance(prompt, list | tuple):
        # The loss covers the completion only, so assistant messages of the prompt get weight 0.
        messages = read_messages(prompt, column, PLAIN, unread)
        if weight is not None:
            messages = [_weighted(message, weight) for message in messages]
        return with_system(remaining, messages)
    texts = [prompt]
    for name in MORE_PROMPT:
        more = remaining.pop(name, None)
        if is_empty(more):
            continue
        if not isinstance(more, str):
            raise Problem("type", f"column {name!r} should be text, not {brief(more)}", "write it as a string")
        texts.append(more)
    question = "\n".join(text for text in texts if text)
    return with_system(remaining, [*_take_history(remaining, unread), {"role": "user", "content": question}])


def _weighted(message: Message, weight: int) -> Message:
    """Return a message; if it is the assistant's, with a weight in place of what it says of the loss."""
    if message.get("role") != "assistant":
        return message
    return {key: value for key, value in message.items() if key != "pieces"} | {"weight": weight}


def with_system(remaining: dict[str, Any], messages: list[Message]) -> list[Message]:
    """Take the system text out of a record, and return it with the messages, which may repeat it.

    Raises:
        Problem: If the record has several system texts, or one that is not text.
    """
    present = {column: remaining.pop(column) for column in SYSTEM_COLUMNS if column in remaining}
    filled = {column: text for column, text in present.items() if not is_empty(text)}
    for column, text in filled.items():
        if not isinstance(text, str):
            raise Problem("type", f"column {column!r} should be text, not {brief(text)}", "write it as a string")
    if not filled:
        return messages
    column, text = next(iter(filled.items()))
    if len(set(filled.values())) > 1:
        raise Problem("columns", f"the record has both {' and '.join(filled)}, which differ", "keep the one that is meant")
    if not messages or messages[0].get("role") != "system":
        return [{"role": "system", "content": text}, *messages]
    if messages[0].get("content") != text:
        what = f"the record has a system text in column {column!r} and another in message 0"
        raise Problem("columns", what, f"keep the one that is meant, or leave the column out by name: --ignore {column}")
    return messages


def _take_history(remaining: dict[str, Any], unread: Unread) -> list[Message]:
    """Take the earlier turns out of a record: pairs of question and answer, or messages, trained on like any other turn."""
    history = remaining.pop("history", None)
    if is_empty(history):
        return []
    remedy = "write a list of pairs [question, answer], or messages in place of the prompt"
    history = json_value(history, "history", remedy)
    if isinstance(history, list | tuple) and all(map(_is_message, history)):
        return read_messages(history, "history", PLAIN, unread)
    if not isinstance(history, list | tuple):
        raise Problem("type", f"history should be a list of pairs, not {brief(history)}", remedy)
    messages: list[Message] = []
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise Problem("type", f"history should be a list of pairs of texts, and has {brief(pair)}", remedy)
        question, answer = pair
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def read_answer(value: Any, column: str, has_tools: bool, unread: Unread) -> list[Message]:
    """Read an answer: a text, a message, a list of messages, or a list of calls.

    Args:
        value: The answer.
        column: The column that it stands in, for a message.
        has_tools: Whether the record has tools, so that a text may be the JSON text of calls.
        unread: Takes the keys that are not read.
    """
    value = messages_in(value)
    if isinstance(value, str):
        calls = _entries_in(value, _is_call) if has_tools else None
        if calls is None:
            return [{"role": "assistant", "content": value}]
        value = calls
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list | tuple) and value and all(_is_call(entry) for entry in value):
        return [{"role": "assistant", "tool_calls": read_calls(value, f"column {column!r}", unread)}]
    _check_messages_or_text(value, column)
    return read_messages(value, column, PLAIN, unread)


def _check_messages_or_text(value: Any, column: str) -> None:
    """Raise Problem for a value that is neither; of several texts, which one is meant would be a guess."""
    if isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(entry, dict) for entry in value)):
        return
    raise Problem("type", f"column {column!r} should be text or messages, not {brief(value)}", "write it as a string")


def messages_in(value: Any) -> Any:
    """Return the messages in a text that is nothing but their JSON text, as CSV holds them; any other value stays as it is."""
    # The cheap test comes first: most values are plain text, which is not worth parsing.
    if not isinstance(value, str) or ('"role"' not in value and '"from"' not in value):
        return value
    messages = _entries_in(value, _is_message)
    return value if messages is None else messages


def _is_message(entry: Any) -> bool:
    """Return whether a value is a message: {role, content}, {role, tool_calls} or {from, value}."""
    if not isinstance(entry, dict):
        return False
    keys = entry.keys()
    return {"from", "value"} <= keys or ("role" in keys and ("content" in keys or "tool_calls" in keys))


def _entries_in(text: str, is_entry: Callable[[Any], bool]) -> list[Any] | None:
    """Return the entries in a text that is nothing but the JSON text of a list of such entries, or of one; otherwise None.

    Args:
        text: The text, which may be JSON of another kind, as an answer in JSON is.
        is_entry: Tells whether a value is an entry.
    """
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        value = json_value(text, "", "")
    except Problem:
        return None
    entries = [value] if isinstance(value, dict) else value
    return entries if entries and all(map(is_entry, entries)) else None


def _is_call(entry: Any) -> bool:
    """Return whether a value is a call as xLAM writes it: {name, arguments}."""
    # A message has a role; one that also has a name and arguments is still a message.
    return isinstance(entry, dict) and "role" not in entry and {"name", "arguments"} <= entry.keys()
