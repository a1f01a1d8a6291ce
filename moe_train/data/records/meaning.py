"""Keys that change the meaning of what they stand in, by their names: a record must not be read without them.

A key is known by its name in any spelling (`loss_weight`, `lossWeight`, `Loss-Weight`), or by a word in its name, since each
trainer has names of its own for the same thing: `no_loss`, `train_on_turn`, `image_path`, `chat_history`, `chain_of_thought`.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

RECORD = ""
MESSAGE = "messages."
PART = "content."
CALL = "tool_calls."
CALLED_FUNCTION = "tool_calls.function."
TOOL = "tools."
TOOL_FUNCTION = "tools.function."
INSIDE = "(inside)."
"""An object in a message, a part or a call that is not read."""

_EVERYWHERE = (RECORD, MESSAGE, PART, CALL, CALLED_FUNCTION, INSIDE)  # in a tool the same words describe what it can do


class _Topic(NamedTuple):
    """Keys with one meaning."""

    reason: str
    """Why such a key is refused, for a message."""
    names: tuple[str, ...]
    words: tuple[str, ...] = ()
    """Words, any of which gives a key this meaning."""
    levels: tuple[str, ...] = _EVERYWHERE
    """Levels of a record at which the keys have this meaning."""


OTHER_TEXT = "it may be text of the message, which is read from another key"
"""Why a key is refused that may hold the text of a message."""
_CHANGES = "it changes the meaning, and is not read here"
_TOPICS = (
    _Topic(
        "it marks an answer as good or bad, which the record kind labelled reads",
        (
            *("label", "labels", "kto_tag", "desirable", "undesirable", "is_desirable", "preferred", "is_preferred"),
            *("is_good", "is_bad", "correct", "incorrect", "is_correct", "is_incorrect", "accepted", "is_accepted"),
            *("preference", "thumbs", "thumbs_up", "thumbs_down"),
        ),
    ),
    _Topic(
        "it belongs to a preference pair, which the record kind preference reads",
        ("chosen", "rejected", "chosen_response", "rejected_response", "chosen_messages", "rejected_messages"),
        ("chosen", "rejected"),
    ),
    _Topic(
        "it holds pictures, sound or video, which are not read here",
        ("images", "image", "audios", "audio", "videos", "video", "rejected_images"),
        ("image", "images", "audio", "audios", "video", "videos"),
    ),
    _Topic(
        "it says what the loss covers, and is not read here; a message of the assistant has weight 0 or 1",
        ("train", "training", "train_detail", "loss", "loss_weight", "loss_scale", "loss_mask", "weight", "mask", "masked"),
        (
            *("train", "training", "trained", "trainable", "untrained", "loss", "losses", "weight", "weights"),
            *("mask", "masks", "masked", "masking"),
        ),
    ),
    _Topic(
        "it may say that the loss does not cover this, and is not read here; a message of the assistant has weight 0 or 1",
        (
            *("ignore", "ignored", "skip", "skipped", "exclude", "excluded", "learn", "supervise", "supervised"),
            *("target", "is_target"),
        ),
        (),
        (MESSAGE, PART),
    ),
    _Topic(
        "it holds reasoning, and is not read here",
        ("reasoning_content", "reasoning", "reasoning_details", "thinking"),
        ("reasoning", "thinking", "think", "thought", "thoughts", "cot", "rationale"),
    ),
    _Topic(_CHANGES, ("history",), ("history",)),
    _Topic(
        "it holds the choices of a question, and is not read here",
        ("choices", "options", "A", "B", "C", "D", "E"),
        ("choice", "choices", "option", "options"),
        (RECORD, MESSAGE),
    ),
    _Topic(
        _CHANGES,
        (
            *("system", "system_prompt", "system_message", "system_instruction", "tools", "available_tools", "functions"),
            *("tool_definitions", "tool_schemas", "available_functions", "function_call", "tool_calls", "documents", "input"),
            *("context", "contexts", "passage", "passages", "chat_template_kwargs", "prefix", "refusal", "instructions", "inputs"),
            *("tool_call", "tool_use", "tool_uses", "function_calls"),
        ),
    ),
    _Topic(
        _CHANGES,
        (
            *("system_instructions", "system_text", "sys", "sys_prompt", "sysprompt", "preamble"),
            *("developer_message", "developer_prompt", "developer_instructions"),
            *("apis", "available_apis", "api_list", "toolset", "tool_list", "tools_list", "tools_json", "tools_available"),
            *("tool_schema", "tool_spec", "tool_specs", "tool_definition", "tool_descriptions", "tool_declarations"),
            *("mcp_tools", "function_schema", "function_schemas", "function_list", "function_definitions"),
            "function_declarations",
        ),
        (),
        (RECORD, MESSAGE),
    ),
    _Topic(
        "it may be what the answer is about, and is not read here",
        (
            *("document", "article", "articles", "paragraph", "paragraphs", "evidence", "background", "knowledge", "retrieved"),
            *("snippet", "snippets", "excerpt", "hint", "hints", "retrieved_documents", "retrieved_context", "source_text"),
        ),
        (),
        (RECORD, MESSAGE),
    ),
    _Topic(
        "it says for whom the message is, and is not read here",
        ("channel", "recipient"),
        (),
        (MESSAGE,),
    ),
    _Topic(_CHANGES, ("partial", "function_response", "tool_requests"), (), (MESSAGE,)),
    _Topic(
        "it may be what the answer is about, and is not read here",
        ("attachments", "attachment", "experimental_attachments", "files", "file"),
        (),
        (MESSAGE,),
    ),
    _Topic(
        OTHER_TEXT,
        ("text", "content", "value", "parts"),
        (),
        (MESSAGE, PART),
    ),
    _Topic(
        "it may be part of the call, which is read from other keys",
        ("name", "arguments", "parameters", "input", "args", "kwargs", "params", "result", "response", "output"),
        (),
        (CALL, CALLED_FUNCTION),
    ),
    _Topic(
        "it may be part of the function, which is read from other keys",
        (
            *("name", "description", "parameters", "input_schema", "arguments", "properties", "required"),
            *("desc", "docstring", "params", "args", "schema"),
        ),
        (),
        (TOOL, TOOL_FUNCTION),
    ),
)
_HARMLESS = ("tool_choice", "train_split", "tools_used")
"""Keys with one of the words that say nothing about the text of a record or its loss."""
_DESCRIBING = frozenset(
    "id ids num count number tokens size width height length duration title score scores rating ratings model logps".split()
)
"""Words of keys that only describe something, such as `video_id` and `score_chosen`; the other words do not count then."""
MEANING_KEYS = frozenset(name for topic in _TOPICS if RECORD in topic.levels for name in topic.names)
"""The usual names of keys that change the meaning of a record."""

_NO_LETTER = re.compile(r"[\W_]+")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+")


def _letters(key: str) -> str:
    """Return the letters and digits of a key in lower case, which are the same in all of its spellings."""
    return _NO_LETTER.sub("", key).lower()


_BY_LETTERS = [frozenset(map(_letters, topic.names)) for topic in _TOPICS]
_HARMLESS_LETTERS = frozenset(map(_letters, _HARMLESS))


# Cached, since the same keys come in every record.
@functools.lru_cache(maxsize=4096)
def lost_meaning(level: str, key: str) -> str | None:
    """Return what is lost if a key of a level is not read, in words; None if nothing is."""
    letters = _letters(key)
    if letters in _HARMLESS_LETTERS:
        return None
    words = {letters, *(word.lower() for word in _WORD.findall(key))}
    if not words.isdisjoint(_DESCRIBING):
        words = {letters}
    for topic, names in zip(_TOPICS, _BY_LETTERS, strict=True):
        if level in topic.levels and (letters in names or not words.isdisjoint(topic.words)):
            return topic.reason
    return None
