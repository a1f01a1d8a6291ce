"""Rules for text, of a record or of a part of a conversation.

No text may contain NUL, certain noncharacters, half a surrogate pair, or a control token that was typed as text. A rule yields
a message for each place that breaks it. Its `fix_…` edits the conversation in place where only one correction is right, and
yields what it changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from moe_train.data.check.requirements import Requirements
from moe_train.data.records.normal_form import MEDIA, Conversation, Message

# NUL, the noncharacters that mark spans while a template is rendered, and lone surrogates.
_NO_TEXT = re.compile("[\x00\ufdd0-\ufdd3\ud800-\udfff]")
_REASONING_TAG = re.compile(r"\s*(<(?:think|thinking|reasoning|thought)>)", re.IGNORECASE)


def unusable_character(text: str) -> str | None:
    """Describe the first character that no text should contain; None if there is none."""
    if text.isascii() and "\0" not in text:
        return None
    match = _NO_TEXT.search(text)
    if match is None:
        return None
    code = ord(match[0])
    if code == 0:
        kind = "NUL"
    elif code < 0xE000:
        kind = "half a surrogate pair"
    else:
        kind = "a noncharacter"
    return f"has {kind} (U+{code:04X}) at character {match.start()}"


def typed_control_token(text: str, form: Requirements) -> str | None:
    """Describe the first control token that a text contains as if a user had typed it; None if there is none."""
    match = form.control.search(text)
    if match is None:
        return None
    return f"has the control token {match[0]} typed as text at character {match.start()}"


def replaced(text: str) -> tuple[str, str | None]:
    """Replace each character that no text should contain by U+FFFD.

    Returns:
        The text, and a description of the change; None if nothing was changed.
    """
    text, count = _NO_TEXT.subn("\ufffd", text)
    return text, f"{count} characters replaced by U+FFFD" if count else None


def _content(message: Message) -> list[str]:
    """Return the texts of a message's content, its reasoning included."""
    content = message.get("content", "")
    if isinstance(content, str):
        return [content]
    # A part holds its text under the name of its type.
    return [part[part["type"]] for part in content if part["type"] not in MEDIA]


def _texts(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """Yield a name for, and the content of, every text of a conversation that a tokenizer sees."""
    for i, message in enumerate(conversation.messages):
        for text in _content(message):
            yield f"message {i} ({message['role']})", text
            # Mistral's v3 decodes a result that is JSON, so an escape becomes the character that it means.
            if message["role"] == "tool" and _decoded(text) != text:
                yield f"message {i} (tool), decoded,", _decoded(text)
        for call in message.get("tool_calls", ()):
            yield f"a call in message {i}", call["function"]["name"]
            # Arguments may be an object, too.
            if isinstance(call["function"].get("arguments"), str):
                yield f"the arguments of a call in message {i}", _decoded(call["function"]["arguments"])
    for i, tool in enumerate(conversation.tools):
        yield f"tool {i}", json.dumps(tool, ensure_ascii=False)


def _decoded(text: str) -> str:
    """Return JSON text with its escapes decoded; other text stays as it is."""
    if "\\u" not in text:
        return text
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


def unusable_characters(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Find texts with a character that no text should contain."""
    for name, text in _texts(conversation):
        if fault := unusable_character(text):
            yield f"{name} {fault}"


def reasoning_as_text(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Find answers that begin with reasoning in the tags of other models, where the tokenizer has a token for it."""
    if not form.reasons:
        return
    for i, message in enumerate(conversation.messages):
        content = _content(message) if message["role"] == "assistant" else []
        tag = _REASONING_TAG.match(content[0]) if content else None
        if tag is not None:
            yield f"message {i} begins with {tag[1]} as text, and this tokenizer writes reasoning with the token [THINK]"


def fix_unusable_characters(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Replace such characters in the contents of messages."""
    for i, message in enumerate(conversation.messages):
        # Contents alone: in names, arguments and tools, U+FFFD would change what is called.
        if isinstance(message.get("content"), str):
            message["content"], change = replaced(message["content"])
            if change:
                yield f"message {i}: {change}"


def typed_control_tokens(conversation: Conversation, form: Requirements) -> Iterator[str]:
    """Find texts with a control token that was typed as text."""
    for name, text in _texts(conversation):
        if fault := typed_control_token(text, form):
            yield f"{name} {fault}"
