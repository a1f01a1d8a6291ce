"""Reasoning and settings that a chat template renders.

Templates read reasoning in one of two spellings: a field of the message, such as Qwen's `reasoning_content`, or parts of its
content, as Mistral's do. Which one is found by rendering a sample. What is rendered is checked afterwards for each conversation,
since a template may leave the reasoning of some turns out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence

from moe_train.data.chat import sandbox
from moe_train.data.chat.example import REASONING_FIELDS, is_trained_on
from moe_train.data.chat.loss_mask import Text
from moe_train.data.chat.renderings import PLAIN_TEXT_MARKS, checked, request, text_or_raise, without_marks
from moe_train.data.chat.settings import NO_SETTINGS, check_effort, not_written, reasoning_not_written
from moe_train.data.records.media import has_media
from moe_train.data.records.normal_form import JOINT, Conversation, Message, ModelSettings, joined_texts, reasoning_of, texts_of
from moe_train.data.records.problem import Problem
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.machine.files import JsonObject

_PARTS = "parts"
_OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")
_SWITCHES = ("enable_thinking", "thinking")  # variables of templates with which a prompt asks for an answer without reasoning
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_SETTINGS = re.compile(r"\[MODEL_SETTINGS\](.*?)\[/MODEL_SETTINGS\]", re.DOTALL)
_OTHERWISE = "use a template that renders it"


def spelled(conversation: Conversation, template: str, tokenizer: HuggingFace) -> Conversation:
    """Return a conversation with text parts joined, and reasoning in the spelling that the template reads.

    Raises:
        Problem: If the template has no place for the reasoning or for a setting of the conversation.
    """
    settings = conversation.settings
    if settings != NO_SETTINGS:
        check_settings(settings, template, tokenizer)
    if not any(message.get("content").__class__ is list for message in conversation.messages):
        return conversation
    messages = [_spelled(message, i, template, tokenizer) for i, message in enumerate(conversation.messages)]
    _check_stated_effort(conversation)
    return conversation._replace(messages=messages)


def check_settings(settings: ModelSettings, template: str, tokenizer: HuggingFace) -> None:
    """Check that the template reads settings.

    Raises:
        Problem: If it does not.
    """
    # A name that only a comment mentions is not read.
    source = _COMMENT.sub("", template)
    for name in ("reasoning_effort", "response_format"):
        if getattr(settings, name) is not None and not _mentions(source, name):
            raise not_written(name, "the chat template does not read it")
    for name in settings.chat_template_kwargs or {}:
        if name in _OWN_VARIABLES or name in tokenizer.named_tokens or name in ModelSettings._fields:
            message = f"chat_template_kwargs has {name!r}, which the record states elsewhere or the tokenizer has"
            raise Problem("settings", message, f"leave {name!r} out of it")
        if not _mentions(source, name):
            raise not_written("chat_template_kwargs", f"the chat template does not read {name!r}")


def _mentions(source: str, name: str) -> bool:
    """Return whether a template mentions a name."""
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


def _check_stated_effort(conversation: Conversation) -> None:
    """Raise Problem if a turn that is trained on reasons, and a setting asks for an answer without reasoning."""
    check_effort(conversation, conversation.settings.reasoning_effort, "reasoning_effort")
    for name in _SWITCHES:
        if (conversation.settings.chat_template_kwargs or {}).get(name) is False:
            check_effort(conversation, "none", f"{name} of chat_template_kwargs")


def check_reasoning_rendered(conversation: Conversation, texts: Sequence[Text]) -> None:
    """Check that the reasoning of the turns that are trained on was rendered, and is trained on.

    Args:
        conversation: The conversation in the normal form.
        texts: Its renderings.

    Raises:
        Problem: If reasoning is missing, or the prompt asks for none.
    """
    trained: list[str] | None = None
    for i, message in enumerate(conversation.messages):
        if message.get("content").__class__ is not list or not is_trained_on(message):
            continue
        for thought in reasoning_of(message):
            if trained is None:
                # Found once, and only for records with reasoning, which are few.
                trained = list(_trained_pieces(texts))
                for text in texts:
                    check_effort(conversation, _rendered_effort(text.text), "the prompt that the chat template renders")
            if not any(thought.strip() in piece for piece in trained):
                raise reasoning_not_written(i, "the chat template leaves it out", _OTHERWISE)


def _trained_pieces(texts: Sequence[Text]) -> Iterator[str]:
    """Yield the parts of texts that are trained on."""
    for text in texts:
        for start, end in text.trained_on:
            yield _plain(text.text[start:end])


def _plain(text: str) -> str:
    """Return a rendering without the marks around what looks like a control token."""
    for mark in PLAIN_TEXT_MARKS:
        text = text.replace(mark, "")
    return text


def _rendered_effort(text: str) -> str | None:
    """Return the reasoning effort "none" if a rendering states it in `[MODEL_SETTINGS]`."""
    match = _SETTINGS.search(text)
    return "none" if match and '"reasoning_effort": "none"' in match[1] else None


def _spelled(message: Message, i: int, template: str, tokenizer: HuggingFace) -> Message:
    """Return a message in the spelling that the template reads."""
    if message.get("content").__class__ is not list:
        return message
    joint = "" if "[MODEL_SETTINGS]" in template else JOINT  # mistral-common's for v15, and for all versions before
    text = joined_texts(message, joint)
    if text is not None:
        return message | {"content": text}
    if has_media(message) and not reasoning_of(message):
        return message | {"content": _with_joined_texts(message["content"], joint)}
    spelling = _spelling(template, tokenizer)
    if spelling is None:
        raise reasoning_not_written(i, "the chat template renders none", _OTHERWISE)
    if spelling == _PARTS:
        if any("closed" in part for part in message["content"]) and not _mentions(template, "closed"):
            raise reasoning_not_written(i, "the chat template does not render reasoning that is cut off", "complete it")
        return message | {"content": _with_joined_texts(message["content"], joint)}
    kinds = [part["type"] for part in message["content"]]
    # `find` gives 0 for "thinking" and 9 for "text", so this holds if all reasoning comes first.
    leads = kinds == sorted(kinds, key="thinking text".find)
    if message["role"] != "assistant" or not leads or any("closed" in part for part in message["content"]):
        reason = f"the chat template reads {spelling}, which is complete and stands before the answer"
        raise reasoning_not_written(i, reason, "write it so")
    return message | {"content": joint.join(texts_of(message)), spelling: "\n".join(reasoning_of(message))}


def _with_joined_texts(parts: list[JsonObject], joint: str) -> list[JsonObject]:
    """Return parts with neighbouring texts joined."""
    joined: list[JsonObject] = []
    for part in parts:
        if joined and joined[-1]["type"] == part["type"] == "text":
            joined[-1] = {"type": "text", "text": joined[-1]["text"] + joint + part["text"]}
        else:
            joined.append(part)
    return joined


@functools.lru_cache(maxsize=8)
def _spelling(template: str, tokenizer: HuggingFace) -> str | None:
    """Return the field in which the template reads reasoning, or `_PARTS`; None if it renders none of a sample."""
    parts = [{"type": "thinking", "thinking": "It hops about."}, {"type": "text", "text": "marsupial"}]
    # Parts first: they keep the order of reasoning and text, which a field cannot.
    candidates: list[tuple[str, Message]] = [(_PARTS, {"content": parts})]
    candidates += [(name, {"content": "marsupial", name: "It hops about."}) for name in REASONING_FIELDS]
    for name, message in candidates:
        if not _mentions(template, "thinking" if name == _PARTS else name):
            continue
        conversation = Conversation([{"role": "user", "content": "What is it?"}, {"role": "assistant"} | message], [])
        text_request = request(conversation, [(2, False)], tokenizer)
        try:
            (rendering,) = checked(sandbox.render_prefixes(template, [text_request])[0], text_request)
            text = without_marks(text_or_raise(rendering))
        except ValueError:
            continue
        # A template that writes a content as it is would write the parts as a list.
        if "It hops about." in text and "marsupial" in text and not re.search(r"""['"]type['"]: ?['"]thinking""", text):
            return name
    return None
