"""Check that a rendered conversation is what was said, and that a model can learn from it to answer and to stop.

A template is somebody's program: it may leave out a system text, or the text beside a call; it may end a turn with something that
ends no generation; its markers may be letters to a tokenizer for which it was not made. None of that shows in a loss.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Sequence

from moe_train.data.chat.chat_date import undated
from moe_train.data.chat.completeness import Rendering, check_complete, check_trained
from moe_train.data.chat.example import OTHER_TEMPLATE
from moe_train.data.chat.renderings import PLAIN_TEXT_MARKS
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem, brief
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.tokenizer import Span

_CORRECT_TEMPLATE = f"correct the template, or name another {OTHER_TEMPLATE}"


def check_rendered(conversation: Conversation, renderings: Sequence[Rendering], template: str, tokenizer: HuggingFace) -> None:
    """Check the texts that a conversation is trained on as.

    Args:
        conversation: The conversation.
        renderings: The texts, in order.
        template: The chat template that wrote them.
        tokenizer: The tokenizer.

    Raises:
        LeftOut: If something that was said is in none of the texts.
        Problem: With the rule `template`, if a turn does not end in a token that ends a generation, or a marker is no token; with
            the rule `image`, if a placeholder for an image is trained on.
    """
    if not renderings:
        return
    plain = [_without_marks(rendering) for rendering in renderings]
    scaffold = check_complete(conversation, plain, template)
    check_trained(conversation, plain)
    for rendering in renderings:
        _check_ends(rendering, tokenizer)
        _check_images(rendering, tokenizer)
    _check_markers(scaffold, conversation, template, tokenizer)


def _without_marks(rendering: Rendering) -> Rendering:
    """Return the rendering without the marks around what looks like a control token."""
    text, spans, end = rendering
    if PLAIN_TEXT_MARKS[0] not in text:
        return rendering
    marks = [match.start() for match in re.finditer("[" + "".join(PLAIN_TEXT_MARKS) + "]", text)]
    for mark in PLAIN_TEXT_MARKS:
        text = text.replace(mark, "")
    # A position moves back by the number of marks before it.
    moved = [(first - bisect.bisect_left(marks, first), last - bisect.bisect_left(marks, last)) for first, last in spans]
    return Rendering(text, moved, end)


def _check_ends(rendering: Rendering, tokenizer: HuggingFace) -> None:
    """Check that each trained turn ends in a token that ends a generation."""
    text = rendering.text
    ends: list[Span] = []
    for start, end in sorted(rendering.trained_on):
        if ends and not text[ends[-1][1] : start].strip():
            ends[-1] = (ends[-1][0], end)  # several messages of one turn
        else:
            ends.append((start, end))
    for start, end in ends:
        turn = text[start:end].rstrip()
        if turn.endswith(tokenizer.end_tokens):
            continue
        stop = ", ".join(tokenizer.end_tokens)
        last = brief(turn[-20:])
        marker = _MARKER_AT_END.search(turn)
        if marker is None:
            message = f"the chat template ends a turn of the assistant with {last}, and not with {stop}"
            raise Problem("template", f"{message}: a model could not learn to stop", _CORRECT_TEMPLATE)
        # Two different faults: a marker that this tokenizer does not know, and a token that is not declared as an end.
        if not tokenizer.is_token(marker[0]):
            raise _letters(marker[0], tokenizer)
        message = f"the chat template ends a turn of the assistant with {marker[0]}, and a generation ends with {stop}"
        remedy = f"name {marker[0]} as eos_token in tokenizer_config.json, or its id under eos_token_id in generation_config.json"
        raise Problem("template", message, f"{remedy}, beside {tokenizer.files[0]}")


_NAMES = (
    "INST SYSTEM_PROMPT AVAILABLE_TOOLS TOOL_CALLS TOOL_RESULTS TOOL_CONTENT ARGS CALL_ID THINK IMG IMG_BREAK IMG_END AUDIO "
    "BEGIN_AUDIO MODEL_SETTINGS PREFIX MIDDLE SUFFIX"
)
_MARKER = (
    r"<[|｜][^\s<>|｜]{1,40}[|｜]>|\[/?(?:" + _NAMES.replace(" ", "|") + r")\]|<</?SYS>>|<(?:start|end)_of_\w{1,20}>|</?s>|<[be]os>"
)
_MARKERS = re.compile(_MARKER)
_MARKER_AT_END = re.compile(f"(?:{_MARKER})$")
_MEANT_AS_LETTERS = frozenset("[INST] [/INST] <<SYS>> <</SYS>> <|system|> <|user|> <|assistant|>".split())
"""Markers of Llama 2, Mistral's v1 and Zephyr, whose own tokenizers have no such tokens."""
_IMAGES = re.compile(
    r"\[IMG(?:_BREAK|_END)?\]|<(?:image|img|video|audio)>|<[|｜](?:image|video|audio|vision)\w*[|｜]>|<(?:start_of_image|image_soft_token)>"
)


def _letters(marker: str, tokenizer: HuggingFace) -> Problem:
    """Return the problem that a marker of the template is no token."""
    message = f"the chat template writes {marker}, and {tokenizer.files[0]} has no such token, so that it would be letters"
    remedy = f"use the tokenizer that the template was made for, or name a template made for this tokenizer {OTHER_TEMPLATE}"
    return Problem("template", message, remedy)


def _check_markers(scaffold: str, conversation: Conversation, template: str, tokenizer: HuggingFace) -> None:
    """Check that each marker that the template writes is one token."""
    # Each marker once, in the order of the text, so that the message is the same every time.
    for marker in dict.fromkeys(_MARKERS.findall(scaffold)):
        if tokenizer.is_token(marker):
            continue
        own = tokenizer.chat_template is not None and undated(template) == tokenizer.chat_template
        if own and marker in _MEANT_AS_LETTERS:
            continue
        if marker in json.dumps([conversation.tools, conversation.messages], ensure_ascii=False, default=str):
            continue  # somebody else's words, in a tool's description for example
        raise _letters(marker, tokenizer)


def _check_images(rendering: Rendering, tokenizer: HuggingFace) -> None:
    """Check that no placeholder for an image is trained on."""
    for start, end in rendering.trained_on:
        for match in _IMAGES.finditer(rendering.text, start, end):
            typed = rendering.text[match.start() - 1 : match.start()] == PLAIN_TEXT_MARKS[0]  # this is encoded as letters
            if tokenizer.is_token(match[0]) and not typed:
                message = f"a turn that is trained on contains {match[0]}, the placeholder of an image"
                raise Problem("image", message, f"remove it from the record, or name a template without it {OTHER_TEMPLATE}")
