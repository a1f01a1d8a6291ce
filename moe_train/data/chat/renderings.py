"""What is asked of a chat template, and what it answers: the texts of a conversation's prefixes.

What somebody wrote and looks like a control token stands between marks in these texts, so that it can be told from what the
template itself writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_train.data.chat.renderer import GENERATION
from moe_train.data.chat.sandbox import Prefix, Request
from moe_train.data.records.conversation import Conversation, Message
from moe_train.data.records.problem import Problem, brief
from moe_train.data.tokenizers.huggingface import HuggingFace

# Unicode noncharacters, which no text contains: what was written and looks like a control token stands between these.
PLAIN = ("\ufdd0", "\ufdd1")
_MARKS = re.compile("[" + "".join(PLAIN + GENERATION) + "]")


class Asked(NamedTuple):
    """A request, and whether some text of its record looks like an escaped mark."""

    request: Request
    escapes: bool


def ask(conversation: Conversation, prefixes: Sequence[Prefix], tokenizer: HuggingFace) -> Asked:
    """The request for prefixes of a conversation, with marks around what looks like a control token. Raises Problem."""
    escapes = False  # by whoever made the record, and not by a template that escapes the mark

    def marked(value: Any) -> Any:
        match value:
            case str():
                nonlocal escapes
                escapes |= _ESCAPED in value
                return _marked(value, tokenizer)
            case list():
                return [marked(item) for item in value]
            case dict():
                return {marked(key): marked(item) for key, item in value.items()}
            case None | bool() | int() | float():
                return value
        raise Problem("type", f"{brief(value)} has no form in JSON, nor in a chat template", "write it as text")

    variables = {
        "messages": [marked(_as_templates_read(message)) | {"role": message["role"]} for message in conversation.messages],
        "tools": marked(conversation.tools) or None,
        "documents": None,
        **tokenizer.named_tokens,
    }
    return Asked(Request(variables, prefixes), escapes)


def _marked(text: str, tokenizer: HuggingFace) -> str:
    """The text with marks around what looks like a control token. Raises Problem if the text contains such marks itself."""
    if not text.isascii() and _MARKS.search(text):
        what = f"the conversation contains a Unicode noncharacter (U+FDD0 to U+FDD3): {brief(text)}"
        raise Problem("unicode", what, "remove it")
    return tokenizer.special_pattern.sub(lambda match: PLAIN[0] + match[0] + PLAIN[1], text)


def _as_templates_read(message: Message) -> Message:
    """Without our weight; the arguments of calls as objects, which is transformers' rule for templates."""
    message = {key: value for key, value in message.items() if key != "weight"}
    if "tool_calls" in message:
        message["tool_calls"] = [
            call | {"function": call["function"] | {"arguments": _parsed(call["function"].get("arguments", "{}"))}}
            for call in message["tool_calls"]
        ]
    return message


def _parsed(arguments: Any) -> Any:
    try:
        value = json.loads(arguments or "{}")
    except (TypeError, ValueError, RecursionError):
        return arguments
    return arguments if isinstance(value, str) else value


def without_marks(text: str) -> str:
    """A rendering without what shows where the assistant wrote."""
    return text.replace(GENERATION[0], "").replace(GENERATION[1], "") if GENERATION[0] in text else text


def checked(texts: list[str | ValueError], asked: Asked) -> list[str | ValueError]:
    """The answers; or why they cannot be used, where the template has escaped our marks."""
    if not asked.escapes and any(isinstance(text, str) and _ESCAPED in text for text in texts):
        what = r"the chat template writes \u escapes, behind which a control token typed as text cannot be told apart"
        return [ValueError(what)] * len(texts)
    return texts


_ESCAPED = r"\ufdd0"


def text_or_raise(text: str | ValueError) -> str:
    if isinstance(text, ValueError):
        raise text
    return text
