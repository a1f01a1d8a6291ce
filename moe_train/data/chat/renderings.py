"""Requests to a chat template and its renderings: the texts of a conversation's prefixes.

User text that looks like a control token is enclosed in marks in these texts, which distinguish it from the control tokens
that the template itself writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from moe_train.data.chat.environment import GENERATION
from moe_train.data.chat.example import OTHER_TEMPLATE
from moe_train.data.chat.sandbox import Prefix, Request
from moe_train.data.records.normal_form import Conversation, Message, ModelSettings
from moe_train.data.records.problem import Problem, brief
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.machine.files import JsonObject

PLAIN_TEXT_MARKS = ("\ufdd0", "\ufdd1")
"""Unicode noncharacters, which no text contains; they enclose user text that looks like a control token."""
_MARKS = re.compile("[" + "".join(PLAIN_TEXT_MARKS + GENERATION) + "]")


def request(conversation: Conversation, prefixes: Sequence[Prefix], tokenizer: HuggingFace) -> Request:
    """Return the request to render prefixes of a conversation, with marks around what looks like a control token.

    Args:
        conversation: The conversation.
        prefixes: The prefixes to render.
        tokenizer: The tokenizer, which says what looks like a control token.

    Raises:
        Problem: If a value has no form in JSON, or a text contains the marks.
    """
    pattern = tokenizer.special_pattern
    messages = []
    for message in conversation.messages:
        content = message.get("content")
        if len(message) == 2 and content.__class__ is str:  # the fast path for almost all messages
            messages.append(message | {"content": marked_text(content, pattern)})
        else:
            # The role stays without marks, since templates compare it.
            messages.append(_marked(_as_templates_read(message), pattern) | {"role": message["role"]})
    # transformers passes None, and no empty list, without tools or documents, and templates test for it.
    tools = _marked(conversation.tools, pattern) or None
    variables = {"messages": messages, "tools": tools, "documents": None, **tokenizer.named_tokens}
    return Request(variables | _settings(conversation.settings, pattern), prefixes)


def _settings(settings: ModelSettings, pattern: re.Pattern[str]) -> JsonObject:
    """Return settings as variables of a template."""
    if settings == ModelSettings():
        return {}
    stated = {"reasoning_effort": settings.reasoning_effort, "response_format": settings.response_format}
    variables = {name: value for name, value in stated.items() if value is not None}
    return _marked((settings.chat_template_kwargs or {}) | variables, pattern)


def _marked(value: Any, pattern: re.Pattern[str]) -> Any:
    """Return a JSON value with marks in all its texts."""
    match value:
        case str():
            return marked_text(value, pattern)
        case list():
            return [_marked(item, pattern) for item in value]
        case dict():
            return {_marked(key, pattern): _marked(item, pattern) for key, item in value.items()}
        case None | bool() | int() | float():
            return value
    raise Problem("type", f"{brief(value)} has no form in JSON, nor in a chat template", "write it as text")


def marked_text(text: str, pattern: re.Pattern[str]) -> str:
    """Return the text with marks around what looks like a control token. Raises Problem if the text itself contains such marks."""
    if not text.isascii() and _MARKS.search(text):
        message = f"the conversation contains a Unicode noncharacter (U+FDD0 to U+FDD3): {brief(text)}"
        raise Problem("unicode", message, "remove it")
    return pattern.sub(_between_marks, text)


def _between_marks(match: re.Match[str]) -> str:
    """Enclose a match in marks."""
    return PLAIN_TEXT_MARKS[0] + match[0] + PLAIN_TEXT_MARKS[1]


def _as_templates_read(message: Message) -> Message:
    """Return the message in the form that transformers passes to templates.

    It has no `weight` or `pieces`, which are our own keys, and call arguments are objects.
    """
    if "weight" in message:
        message = {key: value for key, value in message.items() if key not in ("weight", "pieces")}
    if "tool_calls" in message:
        calls = [
            call | {"function": call["function"] | {"arguments": _parsed(call["function"].get("arguments", "{}"))}}
            for call in message["tool_calls"]
        ]
        message = message | {"tool_calls": calls}
    return message


def _parsed(arguments: Any) -> Any:
    """Parse call arguments; return them unchanged if they are not JSON or are JSON text."""
    try:
        value = json.loads(arguments or "{}")
    except (TypeError, ValueError, RecursionError):
        return arguments
    # Arguments that are a JSON text stay quoted, since a template would write a parsed text without its quotes.
    return arguments if isinstance(value, str) else value


def without_marks(text: str) -> str:
    """Return a rendering without the marks of the assistant's parts."""
    if GENERATION[0] not in text:
        return text
    return text.replace(GENERATION[0], "").replace(GENERATION[1], "")


def checked(texts: list[str | ValueError], text_request: Request) -> list[str | ValueError]:
    """Return the renderings of a request, or errors if the template has escaped our marks."""
    if any(isinstance(text, str) and _ESCAPED in text for text in texts) and not _has_escapes(text_request.variables):
        message = r"the chat template writes \u escapes, behind which a control token typed as text cannot be told apart"
        return [Problem("template", message, f"name a template that does not {OTHER_TEMPLATE}")] * len(texts)
    return texts


# The first of `PLAIN_TEXT_MARKS` as JSON with ensure_ascii spells it.
_ESCAPED = r"\ufdd0"


def _has_escapes(variables: JsonObject) -> bool:
    """Return whether the record itself contains text that looks like an escaped mark."""
    return _ESCAPED in json.dumps(variables, ensure_ascii=False)  # JSON doubles a backslash of the record


def text_or_raise(text: str | ValueError) -> str:
    """Return a rendering, or raise the error in its place."""
    if isinstance(text, ValueError):
        raise text
    return text
