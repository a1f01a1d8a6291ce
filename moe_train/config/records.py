"""Kinds of records: which keys are read, and what happens to a record that is too long."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from moe_train.config.score_head import ScoreTarget
from moe_train.config.section import Section, as_tuple

Keys = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
"""Names of keys of a record."""


class TextRecord(Section):
    """Plain text; the loss covers every token."""

    name: Literal["text"]
    column: str = "text"
    """Key that holds the text."""
    ignore: Keys = ()
    """Names of keys that are not read although they may change the meaning of a record, such as `label` or `messages.reasoning`."""
    too_long: Literal["split", "drop", "error"] = "split"
    """What happens to a record longer than `train.seq_len`."""


class ConversationRecord(Section):
    """The settings of a request, for records that do not state them in columns of these names."""

    reasoning_effort: str | None = None
    """How long the model may think, such as none or high, for records without a column of this name. It is written into prompts
    where the tokenizer or the chat template has a place for it, and is never trained on.
    """
    response_format: dict[str, Any] | None = None
    """Format of answers, as in OpenAI's requests, for records without a column of this name; never trained on."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, such as `enable_thinking`, for records without a column of this name."""


class ChatRecord(ConversationRecord):
    """A list of messages (`role`, `content`) rendered by the chat template; the loss covers the assistant's tokens."""

    name: Literal["chat"]
    column: str = "messages"
    """Key that holds the list of messages. If there is no column `messages`, `interactions`, `conversations` and
    `conversation` are read.
    """
    role: str = "role"
    """Key of a message that holds its role; set `from` for ShareGPT under another column name."""
    content: str = "content"
    """Key of a message that holds its text."""
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field(default={})
    """Mapping from the names of roles in the file to system, user, assistant and tool."""
    ignore: Keys = ()
    """Names of keys that are not read although they may change the meaning of a record, such as `label` or `messages.reasoning`."""
    too_long: Literal["truncate", "drop", "error"] = "error"
    """What happens to a record longer than `train.seq_len`."""


class CompletionRecord(ConversationRecord):
    """A prompt and its completion, rendered as one user turn and one assistant turn of the chat template.

    The columns `system`, `history` (pairs of question and answer), `input`, `context` and `tools` are read too: `input` and
    `context` follow the prompt, each after a line break.
    """

    name: Literal["completion"]
    prompt: str = "prompt"
    """Key that holds the prompt."""
    completion: str = "completion"
    """Key that holds the answer, which is trained on."""
    ignore: Keys = ()
    """Names of keys that are not read although they may change the meaning of a record, such as `label` or `messages.reasoning`."""
    too_long: Literal["truncate", "drop", "error"] = "error"
    """What happens to a record longer than `train.seq_len`."""


class PreferenceRecord(ConversationRecord):
    """A prompt with a preferred and a rejected answer, as texts or messages; read by the objective `preference`."""

    name: Literal["preference"]
    prompt: str | None = "prompt"
    """Key that holds the prompt; null if `chosen` and `rejected` begin with the prompt."""
    chosen: str = "chosen"
    """Key that holds the preferred answer."""
    rejected: str = "rejected"
    """Key that holds the rejected answer."""
    margin: str | None = None
    """Key that holds by how much the preferred answer is better, a number that objective `reward` reads; null for no margin."""
    ignore: Keys = ()
    """Names of keys that are not read although they may change the meaning of a record, such as `label` or `messages.reasoning`."""
    too_long: Literal["drop", "error"] = "error"
    """What happens to a record longer than `train.seq_len`, all its answers counted together: they share a row."""


class LabelledRecord(ConversationRecord):
    """A conversation whose last answer the column `label` marks as good (true) or bad; read by the objective
    `unpaired_preference`."""

    name: Literal["labelled"]
    label: str = "label"
    """Key that marks the last answer as good (true) or bad (false)."""
    messages: str | None = None
    """Key that holds the conversation; null for the keys `prompt` and `completion`."""
    prompt: str = "prompt"
    """Key that holds the prompt, if `messages` is null."""
    completion: str = "completion"
    """Key that holds the answer, if `messages` is null."""
    ignore: Keys = ()
    """Names of keys that are not read although they may change the meaning of a record, such as `label` or `messages.reasoning`."""
    too_long: Literal["drop", "error"] = "error"
    """What happens to a record longer than `train.seq_len`, all its answers counted together: they share a row."""


class ClassificationRecord(ConversationRecord):
    """A text or a conversation with its labels, as in Mistral's Classifier Factory; read by the objective `classification`."""

    name: Literal["classification"]
    text: str = "text"
    """Key that holds the text, if the record has no conversation."""
    messages: str = "messages"
    """Key that holds the conversation; the whole of it is read, up to where the assistant's turn begins if it ends with another."""
    labels: str = "labels"
    """Key that holds the labels: {target: label, list of labels, or null}; with a single target also the label alone."""
    targets: tuple[ScoreTarget, ...] = ()
    """Targets and labels; filled in from the objective, so leave them out."""
    ignore: Keys = ()
    """Names of keys that are not read although they may change the meaning of a record, such as `label` or `messages.reasoning`."""
    too_long: Literal["drop", "error"] = "error"
    """What happens to a record longer than `train.seq_len`."""


class TranscriptionRecord(Section):
    """A clip of sound and its transcript, in the format of a request for a transcription; the loss covers the transcript."""

    name: Literal["transcription"]
    audio: str = "audio"
    """Key that holds the clip: a file in the folder of the records, or a data URL."""
    text: str = "text"
    """Key that holds the transcript."""
    language: str = "language"
    """Key that holds the language as two letters (ISO 639-1); records without it leave it to the model."""
    ignore: Keys = ()
    """Names of keys that are not read although they may change the meaning of a record, such as `label` or `messages.reasoning`."""
    too_long: Literal["drop", "error"] = "error"
    """What happens to a record longer than `train.seq_len`."""


Record = Annotated[
    TextRecord | ChatRecord | CompletionRecord | PreferenceRecord | LabelledRecord | ClassificationRecord | TranscriptionRecord,
    Field(discriminator="name"),
]
"""The tagged union of record kinds."""
