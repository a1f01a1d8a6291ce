"""Types of the normal form, to which every supported spelling of a record is converted (`conversation`).

The normal form is OpenAI's. A message is a dict with `role` (system, user, assistant, tool), `content`, and optionally
`weight`, `tool_calls` [{id, type: function, function: {name, arguments: JSON text}}], `tool_call_id` and `name`. A content is
text, or a list of parts if there are several: {type: text, text}, {type: thinking, thinking, closed: false if it is cut off} and
{type: image, image: data URL or path} (`pictures`), or {type: audio, audio: data URL or path} (`sound`).
Texts that stand side by side are separate parts, since a chat format decides what stands between them (`JOINT`).
Where the loss covers only pieces of a message, it has `pieces`: all its texts in order, each as a list of `Piece`.
A tool is {type: function, function: {name, description, parameters, strict}}.
"""

from __future__ import annotations

from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant", "tool")
"""The roles of messages."""

Message = dict[str, Any]
"""A message in the normal form; see the top of this file."""


TRANSCRIBE = "transcribe"
"""Key of a message of the user that is one clip to transcribe; its value is the language, or "" if it is not stated."""
MEDIA = ("image", "audio")
"""Types of parts that hold no text."""


class ModelSettings(NamedTuple):
    """Settings of a request that some tokenizers write into the prompt (v15: `[MODEL_SETTINGS]`); they are never trained on."""

    reasoning_effort: str | None = None
    """How long the model may think, such as "none" or "high"; None if the record does not say."""
    response_format: dict[str, Any] | None = None
    """The format that the answer must have, as in OpenAI's requests; None for text, or if the record does not say."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template, such as enable_thinking; None if the record has none."""


class Conversation(NamedTuple):
    """Messages and tools in the normal form; see the top of this file."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    settings: ModelSettings = ModelSettings()


class PreferencePair(NamedTuple):
    """A prompt with a preferred and a rejected continuation."""

    prompt: Conversation
    """Messages that both continuations share, and their tools."""
    chosen: list[Message]
    rejected: list[Message]
    margin: float = 0.0
    """The lead of the preferred answer; 0 if the record does not state one."""


class LabelledAnswer(NamedTuple):
    """A conversation whose last turn is marked as good or bad."""

    conversation: Conversation
    good: bool


class ClassifiedText(NamedTuple):
    """A text or a conversation with labels."""

    content: str | Conversation
    labels: tuple[float, ...]
    """1 or 0 for each label of each target; NaN for all labels of a target that is not known."""


class Piece(NamedTuple):
    """A piece of a text, and whether the loss covers it."""

    text: str
    trained_on: bool


def pieces_of(message: Message) -> list[list[Piece]]:
    """Return the texts of a message in order, reasoning included, each in the pieces that differ in their loss."""
    if "pieces" in message:
        return message["pieces"]
    content = message.get("content") or ""
    if isinstance(content, str):
        return [[Piece(content, True)]] if content else []
    # A part holds its text under the name of its type.
    return [[Piece(part[part["type"]], True)] for part in content if part["type"] not in MEDIA]


def texts_of(message: Message) -> list[str]:
    """Return the texts of a message's content, without its reasoning."""
    content = message.get("content", "")
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part["type"] == "text"]


def reasoning_of(message: Message) -> list[str]:
    """Return the texts of a message's reasoning."""
    content = message.get("content")
    if not isinstance(content, list):
        return []
    return [part["thinking"] for part in content if part["type"] == "thinking"]


JOINT = "\n\n"
"""What stands between the text parts of a message, as in mistral-common up to v13."""


def joined_texts(message: Message, joint: str = JOINT) -> str | None:
    """Return the text of a message, with its text parts joined; None if it has no content, or more than texts in it."""
    content = message.get("content")
    if isinstance(content, list) and all(part["type"] == "text" for part in content):
        return joint.join(texts_of(message))
    return content if isinstance(content, str) else None


NormalRecord = str | Conversation | PreferencePair | LabelledAnswer | ClassifiedText
"""A record in the normal form; a text is plain text."""


def messages_of(record: NormalRecord) -> list[Message]:
    """Return all messages of a record; none of a text."""
    match record:
        case str():
            return []
        case Conversation():
            return record.messages
        case PreferencePair():
            return [*record.prompt.messages, *record.chosen, *record.rejected]
        case LabelledAnswer():
            return record.conversation.messages
        case ClassifiedText():
            return messages_of(record.content)


def tools_of(record: NormalRecord) -> list[dict[str, Any]]:
    """Return the tools of a record."""
    match record:
        case str():
            return []
        case Conversation():
            return record.tools
        case PreferencePair():
            return record.prompt.tools
        case LabelledAnswer():
            return record.conversation.tools
        case ClassifiedText():
            return tools_of(record.content)
