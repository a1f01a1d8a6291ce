"""Normal form of records: every supported spelling becomes plain text, or a conversation of messages with its tools.

    section = recognise(fields)                 # a config.Record that fits the record, by its columns
    normalise(fields, section)                  # str | Conversation

Supported spellings (`…` stands for a list):

| columns | |
|---|---|
| `text` or `content` | plain text |
| `messages: […]`, `tools: […]` | OpenAI's and Mistral's; also `interactions`, `available_tools`, `system_prompt` |
| `conversations: [{from, value}]` | ShareGPT's: human, gpt, system, function_call, observation; optionally a column `system` |
| `prompt`, `completion` or `question`, `answer` | one turn each; also two lists of messages (the loss skips those of the prompt) |

The normal form is OpenAI's. Messages have `role` (system, user, assistant, tool), `content`, and optionally `weight`,
`tool_calls` [{id, type: function, function: {name, arguments: JSON text}}], `tool_call_id` and `name`. Tools are
[{type: function, function: {name, description, parameters}}]. Keys with the value null are left out, because columnar files
fill missing keys with null. `normalise` only renames and nests, and rejects only what it cannot interpret: an unknown role,
or a call without a result, passes and is found later by `rules`. Training and `check` both read records through this file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moe_train import config
from moe_train.data.records.normal_form import Conversation, Message
from moe_train.data.records.problem import Problem, brief, field, text_field

_TEXT = ("text", "content")
_MESSAGES = ("messages", "interactions", "conversations")
_TOOLS = ("tools", "available_tools")
_SYSTEM = ("system_prompt", "system")
_TURNS = (("prompt", "completion"), ("question", "answer"))
_PAIRS = {"chosen", "rejected"}
_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "function_call": "function_call", "observation": "tool", "tool": "tool",
}  # fmt: skip


def recognise(fields: Mapping[str, Any]) -> config.Record:
    """Return the record section that fits a record, by its columns.

    Raises:
        Problem: If no section fits, or two do.
    """
    present = {name for name, value in fields.items() if value is not None}
    for column in _MESSAGES:
        if column in present:
            return config.ChatRecord(name="chat", column=column)
    if present >= _PAIRS:
        raise Problem(
            "columns",
            "the record is a preference pair (chosen, rejected), which is not trained on",
            "map completion to chosen, or drop it",
        )
    for prompt, completion in _TURNS:
        if {prompt, completion} <= present:
            return config.CompletionRecord(name="completion", prompt=prompt, completion=completion)
    if present >= set(_TEXT):
        raise Problem("text-and-content", "the record has both text and content", "keep the one that is meant")
    for column in _TEXT:
        if column in present:
            return config.TextRecord(name="text", column=column)
    supported = "text, messages, interactions, conversations, prompt and completion, question and answer"
    raise Problem(
        "columns",
        f"no column is one of {supported}; the record has {brief(', '.join(fields))}",
        "say which columns count in the record section of a config",
    )


def normalise(fields: Mapping[str, Any], record: config.Record) -> str | Conversation:
    """Convert a record to its text or its conversation.

    Args:
        fields: The columns of the record.
        record: The section that says how to read them.

    Raises:
        Problem: If the record has no normal form.
    """
    match record:
        case config.TextRecord(column=column):
            if column in _TEXT and len(fields) > 1 and all(fields.get(name) is not None for name in _TEXT):
                raise Problem("text-and-content", "the record has both text and content", "keep the one that is meant")
            return text_field(fields, column)
        case config.ChatRecord():
            return _conversation(fields, record)
        case config.CompletionRecord(prompt=prompt, completion=completion):
            return _completion(field(fields, prompt), field(fields, completion), record)


def columns(record: config.Record) -> tuple[str, ...]:
    """Return the columns that `normalise` may read from a record."""
    match record:
        case config.TextRecord(column=column):
            if column in _TEXT:
                return tuple(dict.fromkeys((column, *_TEXT)))
            return (column,)
        case config.ChatRecord():
            return (*_message_columns(record), *_TOOLS, *_SYSTEM)
        case config.CompletionRecord(prompt=prompt, completion=completion):
            return (prompt, completion)


def denormalise(fields: Mapping[str, Any], conversation: Conversation, record: config.Record) -> dict[str, Any]:
    """Return `fields` with an edited conversation in place of the columns that it was read from.

    A completion record with two texts keeps its two columns; any other conversation is written in the normal form.
    """
    if isinstance(record, config.CompletionRecord) and isinstance(fields[record.prompt], str):
        turns = {record.prompt: conversation.messages[0]["content"], record.completion: conversation.messages[1]["content"]}
        return {**fields, **turns}
    other_columns = {name: value for name, value in fields.items() if name not in columns(record)}
    return {"messages": conversation.messages, **({"tools": conversation.tools} if conversation.tools else {}), **other_columns}


def _message_columns(record: config.ChatRecord) -> tuple[str, ...]:
    """Return the columns in which the messages of a record may be."""
    return _MESSAGES if record.column == "messages" else (record.column,)


def _conversation(fields: Mapping[str, Any], record: config.ChatRecord) -> Conversation:
    """Read a chat record: its messages, a system prompt in a column of its own, and its tools."""
    if len(fields) == 1 and record.column in fields:
        return Conversation(_messages(fields[record.column], record.column, record), [])
    names = [name for name in _message_columns(record) if fields.get(name) is not None]
    if len(names) > 1:
        raise Problem("columns", f"the record has both {names[0]} and {names[1]}", "keep the one that is meant")
    column = names[0] if names else record.column
    messages = _messages(field(fields, column), column, record)
    prompts = [name for name in _SYSTEM if fields.get(name)]
    if prompts:
        messages.insert(0, {"role": "system", "content": fields[prompts[0]]})
    tool_columns = [name for name in _TOOLS if fields.get(name)]
    if len(tool_columns) > 1:
        raise Problem("columns", "the record has both tools and available_tools", "keep the one that is meant")
    return Conversation(messages, _tools(fields[tool_columns[0]], tool_columns[0]) if tool_columns else [])


def _completion(prompt: Any, completion: Any, record: config.CompletionRecord) -> Conversation:
    """Read a completion record, whose prompt and completion are texts or lists of messages."""
    if isinstance(prompt, list) and isinstance(completion, list):
        plain = config.ChatRecord(name="chat")
        # The loss covers the completion only, so assistant messages of the prompt get weight 0.
        before = _messages(prompt, record.prompt, plain)
        for i, message in enumerate(before):
            if message.get("role") == "assistant":
                before[i] = message | {"weight": 0}
        return Conversation(before + _messages(completion, record.completion, plain), [])
    for column, value in ((record.prompt, prompt), (record.completion, completion)):
        if not isinstance(value, str):
            raise Problem("type", f"column {column!r} should be text, not {brief(value)}", "write it as a string")
    return Conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}], [])


def _messages(value: Any, column: str, record: config.ChatRecord) -> list[Message]:
    """Convert a list of messages of any supported spelling to the normal form."""
    if isinstance(value, tuple):
        value = list(value)
    if not isinstance(value, list) or not value:
        message = f"{column} should be a list with at least one message, not {brief(value)}"
        raise Problem("type", message, "write one object with role and content for each turn")
    messages: list[Message] = []
    plain = record.role == "role" and record.content == "content" and not record.roles
    for i, entry in enumerate(value):
        if plain and _is_plain(entry):
            messages.append(entry)  # the fast path for almost all messages
            continue
        if not isinstance(entry, dict):
            message = f"message {i} should be an object with role and content, not {brief(entry)}"
            raise Problem("type", message, 'write {"role": …, "content": …}')
        entry = {key: item for key, item in entry.items() if item is not None}
        if "role" not in entry and "from" in entry:
            messages.append(_sharegpt(entry, messages))
        else:
            messages.append(_message(entry, record))
    return messages


def _is_plain(entry: Any) -> bool:
    """Return whether an entry is already in the normal form, with only a role and a content."""
    return entry.__class__ is dict and len(entry) == 2 and isinstance(entry.get("content"), str) and entry.get("role") is not None


def _message(entry: Message, record: config.ChatRecord) -> Message:
    """Convert a message with `role` and `content` (or the keys that `record` names) to the normal form."""
    role = entry.get(record.role)
    renamed = {"role": record.roles.get(role, role) if isinstance(role, str) else role, "content": entry.get(record.content)}
    rest = {key: item for key, item in entry.items() if key not in (record.role, record.content, *renamed)}
    message = {key: item for key, item in (renamed | rest).items() if item is not None}
    content = message.get("content")
    if isinstance(content, list) and content and all(_is_text_chunk(chunk) for chunk in content):
        message["content"] = "".join(chunk["text"] for chunk in content)
    calls = message.pop("tool_calls", None)
    if calls is not None and not isinstance(calls, list):
        raise Problem("type", f"tool_calls should be a list, not {brief(calls)}", "write a list of calls")
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
        if message.get("content") == "":
            del message["content"]
    return message


def _is_text_chunk(chunk: Any) -> bool:
    """Return whether a chunk of a content list is text."""
    return isinstance(chunk, dict) and chunk.get("type") == "text" and isinstance(chunk.get("text"), str)


def _call(call: Any) -> Any:
    """Convert a tool call to the normal form; anything that is not an object passes, for `rules` to find."""
    if not isinstance(call, dict):
        return call
    call = {key: item for key, item in call.items() if item is not None}
    if "function" not in call and "name" in call:  # Mistral's form in texts: {name, arguments, id}
        function = {key: call.pop(key) for key in ("name", "arguments") if key in call}
        call = {**call, "function": function}
    return {**call, "type": call.get("type", "function")}


def _sharegpt(entry: Message, before: list[Message]) -> Message:
    """Convert a ShareGPT message to the normal form.

    Args:
        entry: The message, with `from` and `value`.
        before: The converted messages before it. ShareGPT has no call ids: calls are numbered, and a result answers the first
            call that has none yet.
    """
    speaker = entry["from"]
    value = entry.get("value")
    role = _SHAREGPT.get(speaker, speaker) if isinstance(speaker, str) else speaker
    rest = {"weight": entry["weight"]} if "weight" in entry else {}
    if role == "function_call":
        call: Any = value
        if isinstance(value, str):
            try:
                call = json.loads(value)
            except (ValueError, RecursionError):
                error_text = f"a function_call of {brief(value)} is not JSON"
                raise Problem("arguments", error_text, 'write {"name": …, "arguments": …}') from None
        calls: list[dict[str, Any]] = []
        for function_call in call if isinstance(call, list) else [call]:
            if not isinstance(function_call, dict):
                error_text = f"a function_call of {brief(function_call)} is no call"
                raise Problem("arguments", error_text, 'write {"name": …, "arguments": …}')
            arguments = function_call.get("arguments", {})  # ShareGPT writes them inside the JSON text, usually as an object
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            number = sum(len(message.get("tool_calls", ())) for message in before) + len(calls)
            name = function_call.get("name")
            calls.append({"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": arguments}})
        return {"role": "assistant", "tool_calls": calls, **rest}
    message = {"role": role, **({} if value is None else {"content": value}), **rest}
    if role == "tool":
        answered = [earlier.get("tool_call_id") for earlier in before]  # ids may have any type here; `rules` checks them
        called: list[Any] = []
        for earlier in before:
            called += [call.get("id") for call in earlier.get("tool_calls", ()) if isinstance(call, dict)]
        unanswered = [call_id for call_id in called if call_id is not None and call_id not in answered]
        if unanswered:
            message["tool_call_id"] = unanswered[0]
    return message


def _tools(value: Any, column: str) -> list[Any]:
    """Convert a list of tools, or its JSON text, to the normal form."""
    if isinstance(value, str):  # columnar files cannot store values of varying schema, so tools are JSON text there
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Problem("type", f"{column} of {brief(value)} is not JSON", "write a list of tools") from None
    if not isinstance(value, list):
        raise Problem("type", f"{column} should be a list, not {brief(value)}", "write a list of tools")
    return [_tool(tool) for tool in value]


def _tool(tool: Any) -> Any:
    """Wrap a bare function as {type: function, function}; anything else passes."""
    if not isinstance(tool, dict) or "function" in tool or "name" not in tool:
        return tool
    return {"type": "function", "function": tool}
