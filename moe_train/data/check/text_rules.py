"""Rules of text, of a record or of a part of a conversation: no NUL, noncharacter or half a pair, no typed control token.

A rule yields a message for each place that breaks it. Its `fix_…` changes the conversation in place where there is one
right answer, and yields what it did.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from moe_train.data.check.form import Form
from moe_train.data.records.conversation import Conversation

# NUL, the noncharacters that mark spans while a template is rendered, and halves of surrogate pairs.
_NO_TEXT = re.compile("[\x00\ufdd0-\ufdd3\ud800-\udfff]")


def unusable_character(text: str) -> str | None:
    """What to say of the first character that no text should have; None where there is none."""
    if (text.isascii() and "\0" not in text) or not (found := _NO_TEXT.search(text)):
        return None
    code = ord(found[0])
    kind = "NUL" if code == 0 else "half a surrogate pair" if code < 0xE000 else "a noncharacter"
    return f"has {kind} (U+{code:04X}) at character {found.start()}"


def typed_control_token(text: str, form: Form) -> str | None:
    """What to say of the first control token that stands in a text as if somebody had typed it; None where there is none."""
    found = form.control.search(text)
    return f"has the control token {found[0]} typed as text at character {found.start()}" if found else None


def replaced(text: str) -> tuple[str, str | None]:
    """The text with U+FFFD for each character that no text should have, and what was changed; None where nothing was."""
    text, count = _NO_TEXT.subn("\ufffd", text)
    return text, f"{count} characters replaced by U+FFFD" if count else None


def _texts(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """Every text of a conversation that a tokenizer sees, and what to call it."""
    for i, message in enumerate(conversation.messages):
        if "content" in message:
            yield f"message {i} ({message['role']})", message["content"]
        for call in message.get("tool_calls", ()):
            yield f"a call in message {i}", call["function"]["name"]
            if isinstance(call["function"].get("arguments"), str):
                yield f"the arguments of a call in message {i}", call["function"]["arguments"]
    for i, tool in enumerate(conversation.tools):
        yield f"tool {i}", json.dumps(tool, ensure_ascii=False)


def unusable_characters(conversation: Conversation, form: Form) -> Iterator[str]:
    for name, text in _texts(conversation):
        if fault := unusable_character(text):
            yield f"{name} {fault}"


def fix_unusable_characters(conversation: Conversation, form: Form) -> Iterator[str]:
    for i, message in enumerate(conversation.messages):
        if "content" in message:
            message["content"], change = replaced(message["content"])
            if change:
                yield f"message {i}: {change}"


def typed_control_tokens(conversation: Conversation, form: Form) -> Iterator[str]:
    for name, text in _texts(conversation):
        if fault := typed_control_token(text, form):
            yield f"{name} {fault}"
