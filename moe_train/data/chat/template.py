"""Convert conversations to tokens with a Hugging Face tokenizer.

The chat template renders the text (`renderings`), part of the text is trained on (`loss_mask`), and the tokenizer encodes it.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from moe_train.data.chat import sandbox
from moe_train.data.chat.example import Example, without_tools
from moe_train.data.chat.loss_mask import Steps, Text, trained_texts
from moe_train.data.chat.renderings import PLAIN_TEXT_MARKS, checked, request, text_or_raise, without_marks
from moe_train.data.chat.sandbox import Request
from moe_train.data.records.normal_form import Conversation, Message
from moe_train.data.tokenizers.huggingface import HuggingFace, Marked


def examples(conversations: Sequence[Conversation], template: str, tokenizer: HuggingFace) -> list[list[Example] | ValueError]:
    """Convert conversations to training examples; they are rendered and encoded together. With tools, call `check_has_tools` first.

    Returns:
        For each conversation one example, or with tools one for each assistant turn that is trained on; or a ValueError in one
        line, if the template rejects the conversation or its turns cannot be located.
    """
    rendered = _rendered([trained_texts(conversation, tokenizer) for conversation in conversations], template, tokenizer)
    texts: list[_Written] = []
    for written in rendered:
        if not isinstance(written, ValueError):
            texts += written
    encoded = iter(_encode(texts, tokenizer))
    results: list[list[Example] | ValueError] = []
    for written in rendered:
        if isinstance(written, ValueError):
            results.append(written)
        else:
            results.append([next(encoded) for _ in written])
    return results


def prompt(conversation: Conversation, template: str, tokenizer: HuggingFace) -> list[int]:
    """Return the tokens up to where the assistant's next turn begins."""
    text = Text(without_marks(_text(conversation, True, template, tokenizer)), [], [])
    return _encode([_written(text, tokenizer)], tokenizer)[0].tokens


@functools.lru_cache(maxsize=8)
def check_has_tools(template: str, tokenizer: HuggingFace) -> None:
    """Check that a template can represent tools, by rendering a sample conversation.

    Raises:
        Problem: If the template omits tools, calls or results, or writes them with control tokens that the tokenizer lacks.
    """
    function = {"name": "look_up", "description": "Look a word up.", "parameters": {"type": "object", "properties": {}}}
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "quokka"}'}}
    messages: list[Message] = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "look_up", "content": "marsupial"},
        {"role": "assistant", "content": "It is small."},
    ]
    try:
        tools = [{"type": "function", "function": function}]
        text = _text(Conversation(messages, tools), False, template, tokenizer)
    except ValueError as error:
        raise without_tools(f"the chat template takes none ({error})") from error
    for feature, shown in (("tools", "Look a word up."), ("calls", "quokka"), ("results", "marsupial")):
        if shown not in text:
            raise without_tools(f"the chat template leaves {feature} out")
    for token in re.findall(r"\[/?[A-Z_]+\]", text):
        if len(tokenizer.encode_control(token)) != 1:
            raise without_tools(f"the chat template writes {token}, which {tokenizer.files[0]} has no token for")


# --- rendering -------------------------------------------------------------------------------------------------


class _Written(NamedTuple):
    """A `Text` in the tokenizer's form; the first `num_trained` spans are trained on, the others are random."""

    marked: Marked
    num_trained: int


def _rendered(steps: list[Steps], template: str, tokenizer: HuggingFace) -> list[list[_Written] | ValueError]:
    """Run the generators of all conversations in lockstep, so that all their requests are sent to the sandbox at once.

    Returns:
        The texts of each conversation, or its error.
    """
    results: list[list[_Written] | ValueError] = [[] for _ in steps]
    answered: list[tuple[int, list[list[str | ValueError]] | None]] = [(i, None) for i in range(len(steps))]
    while answered:
        pending: list[tuple[int, list[Request]]] = []
        for i, answers in answered:
            try:
                pending.append((i, next(steps[i]) if answers is None else steps[i].send(answers)))
            except StopIteration as done:
                results[i] = [_written(text, tokenizer) for text in done.value]
            except ValueError as error:
                results[i] = error
        try:
            all_requests = itertools.chain.from_iterable(requests for _, requests in pending)
            texts = iter(sandbox.render_prefixes(template, list(all_requests)))
        except ValueError as error:  # the template itself is at fault
            for i, _ in pending:
                results[i] = error
            return results
        # The next round sends each generator its renderings; finished generators have left the list.
        answered = [(i, [checked(next(texts), asked) for asked in requests]) for i, requests in pending]
    return results


def _text(conversation: Conversation, prompt: bool, template: str, tokenizer: HuggingFace) -> str:
    """Render one conversation."""
    text_request = request(conversation, [(len(conversation.messages), prompt)], tokenizer)
    (text,) = checked(sandbox.render_prefixes(template, [text_request])[0], text_request)
    return text_or_raise(text)


# --- text to ids -----------------------------------------------------------------------------------------------


_SPLIT = re.compile("[" + "".join(PLAIN_TEXT_MARKS) + "]")


def _written(text: Text, tokenizer: HuggingFace) -> _Written:
    """Move the marks: from around user text that looks like a control token to around the control tokens themselves."""
    pieces = _SPLIT.split(text.text)
    spans = text.trained_on + text.random
    if len(pieces) > 1:  # translate positions in the text with marks to positions without
        marks = [end + i for i, end in enumerate(itertools.accumulate(map(len, pieces[:-1])))]
        spans = [(start - bisect.bisect_left(marks, start), end - bisect.bisect_left(marks, end)) for start, end in spans]
    return _Written(tokenizer.marked(pieces, spans), len(text.trained_on))


def _encode(texts: list[_Written], tokenizer: HuggingFace) -> list[Example]:
    """Encode texts; ids that touch a trained span are trained on, unless they touch a random one."""
    encoded = []
    for (ids, touched), text in zip(tokenizer.encode_marked([text.marked for text in texts]), texts, strict=True):
        mask = [False] * len(ids)
        for i, (first, last) in enumerate(touched):
            mask[first:last] = [i < text.num_trained] * (last - first)
        encoded.append(Example(ids, mask))
    return encoded
