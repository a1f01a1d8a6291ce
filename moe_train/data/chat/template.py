"""Conversations to tokens under a Hugging Face tokenizer: its chat template makes the text (`renderings`), of which some is
learnt (`learnt`), and the tokenizer makes ids of it.

Most templates do nothing with contents but write them. Then one rendering does for all conversations whose messages
have the same roles in the same order: it is made with contents left open, and filled in (`outline`).
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
from moe_train.data.chat.loss_mask import Renderings, Steps, Text, added_spans, around, learnt_text, learnt_texts
from moe_train.data.chat.outline import Order, Outline, fill, order_of, outline_of
from moe_train.data.chat.renderings import PLAIN, Asked, ask, checked, text_or_raise, unmarked, without_marks
from moe_train.data.records.conversation import Conversation, Message
from moe_train.data.tokenizers.huggingface import HuggingFace, Marked


def examples(conversations: Sequence[Conversation], template: str, tokenizer: HuggingFace) -> list[list[Example] | ValueError]:
    """Of each conversation one example where it has no tools, and otherwise one for each turn of the assistant that bears
    loss; or why there is none.

    That is a ValueError (one line) for what the template refuses, and where turns cannot be told apart. Tools need
    `check_has_tools` before. Texts are rendered and encoded for all conversations at once.
    """
    filled = _filled(conversations, template, tokenizer)
    others = [learnt_texts(each, tokenizer) for each, some in zip(conversations, filled, strict=True) if some is None]
    rendered = iter(_rendered(others, template, tokenizer))
    made = [next(rendered) if some is None else some for some in filled]
    texts = [text for some in made if not isinstance(some, ValueError) for text in some]
    encoded = iter(_encode(texts, tokenizer))
    return [some if isinstance(some, ValueError) else [next(encoded) for _ in some] for some in made]


def prompt(conversation: Conversation, template: str, tokenizer: HuggingFace) -> list[int]:
    """The tokens up to where the assistant's next turn begins."""
    text = Text(without_marks(_text(conversation, True, template, tokenizer)), [], [])
    return _encode([_written(text, tokenizer)], tokenizer)[0].tokens


@functools.lru_cache(maxsize=8)
def check_has_tools(template: str, tokenizer: HuggingFace) -> None:
    """Raise Problem where the template leaves tools, calls or results out, or writes them with tokens that are not there."""
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
    for what, shown in (("tools", "Look a word up."), ("calls", "quokka"), ("results", "marsupial")):
        if shown not in text:
            raise without_tools(f"the chat template leaves {what} out")
    for token in re.findall(r"\[/?[A-Z_]+\]", text):
        if len(tokenizer.encode_control(token)) != 1:
            raise without_tools(f"the chat template writes {token}, which {tokenizer.files[0]} has no token for")


# --- rendering -------------------------------------------------------------------------------------------------


class _Written(NamedTuple):
    """A `Text` as the tokenizer takes it; of its spans the first `num_learnt` are learnt, the others random."""

    marked: Marked
    num_learnt: int


def _rendered(steps: list[Steps], template: str, tokenizer: HuggingFace) -> list[list[_Written] | ValueError]:
    """The texts of each conversation, whose steps are taken together, so that all their requests cross to the sandbox at once."""
    found: list[list[_Written] | ValueError] = [[] for _ in steps]
    told: list[tuple[int, list[list[str | ValueError]] | None]] = [(i, None) for i in range(len(steps))]
    while told:
        asking: list[tuple[int, list[Asked]]] = []
        for i, answers in told:
            try:
                asking.append((i, next(steps[i]) if answers is None else steps[i].send(answers)))
            except StopIteration as done:
                found[i] = [_written(text, tokenizer) for text in done.value]
            except ValueError as error:
                found[i] = error
        try:
            texts = iter(sandbox.render_prefixes(template, [asked.request for _, some in asking for asked in some]))
        except ValueError as error:  # the template's own
            for i, _ in asking:
                found[i] = error
            return found
        told = [(i, [checked(next(texts), asked) for asked in some]) for i, some in asking]
    return found


def _text(conversation: Conversation, prompt: bool, template: str, tokenizer: HuggingFace) -> str:
    asked = ask(conversation, [(len(conversation.messages), prompt)], tokenizer)
    (text,) = checked(sandbox.render_prefixes(template, [asked.request])[0], asked)
    return text_or_raise(text)


# --- outlines --------------------------------------------------------------------------------------------------


def _filled(
    conversations: Sequence[Conversation], template: str, tokenizer: HuggingFace
) -> list[list[_Written] | ValueError | None]:
    """The text of each conversation whose order has an outline."""
    known = _outlines(template, tokenizer)
    if len(known) > _MOST_OUTLINES:
        known.clear()
    orders = [order_of(conversation) for conversation in conversations]
    if new := [order for order in dict.fromkeys(orders) if order is not None and order not in known]:
        steps = [_outlined(order, tokenizer) for order in new]
        for one, made in zip(new, _rendered(steps, template, tokenizer), strict=True):
            known[one] = None if isinstance(made, ValueError) else outline_of(made[0].marked)
    found: list[list[_Written] | ValueError | None] = []
    for (messages, _), order in zip(conversations, orders, strict=True):
        outline = None if order is None else known[order]
        if outline is None:
            found.append(None)
            continue
        try:
            text = fill(outline, [unmarked(message["content"]) for message in messages])
            found.append([_Written(text, len(text.spans))])
        except ValueError as error:
            found.append(error)
    return found


@functools.lru_cache(maxsize=8)
def _outlines(template: str, tokenizer: HuggingFace) -> dict[Order, Outline | None]:
    """Those made so far; None where texts have to be rendered one by one."""
    return {}


_MOST_OUTLINES = 1 << 12


def _outlined(order: Order, tokenizer: HuggingFace) -> Steps:
    """The text of conversations of that order with their contents left open. Raises ValueError where what is learnt, or
    what the text is, may depend on them."""
    messages = [{"role": role, "content": "" if empty else "any"} for role, _, empty in order]
    learnt = [i for i, (_, learnt, _) in enumerate(order) if learnt]
    prefixes = list(dict.fromkeys([(len(order), False), *around(learnt)]))
    (answers,) = yield [ask(Conversation(messages, []), prefixes, tokenizer, outline=True)]
    renderings = Renderings(Conversation(messages, []), dict(zip(prefixes, answers, strict=True)), tokenizer)
    text = without_marks(text_or_raise(renderings.known[len(order), False]))
    for through, _, end in added_spans(renderings, learnt).values():
        if through is None or not text.startswith(through) or not through[:end].endswith(tokenizer.special_tokens):
            raise ValueError("where the assistant's turns stand may depend on what is said")
    return [(yield from learnt_text(renderings, learnt, None))]


# --- text to ids -----------------------------------------------------------------------------------------------


_SPLIT = re.compile("[" + "".join(PLAIN) + "]")


def _written(text: Text, tokenizer: HuggingFace) -> _Written:
    """Marks move: from around text that only looks like a control token to around the control tokens themselves."""
    pieces, spans = _SPLIT.split(text.text), text.learnt + text.random
    if len(pieces) > 1:  # from places in a text with marks to places in one without
        marks = [end + i for i, end in enumerate(itertools.accumulate(map(len, pieces[:-1])))]
        spans = [(start - bisect.bisect_left(marks, start), end - bisect.bisect_left(marks, end)) for start, end in spans]
    return _Written(tokenizer.marked(pieces, spans), len(text.learnt))


def _encode(texts: list[_Written], tokenizer: HuggingFace) -> list[Example]:
    """Ids of each text; those that touch a learnt span bear loss, unless they touch a random one."""
    found = []
    for (ids, touched), text in zip(tokenizer.encode_marked([text.marked for text in texts]), texts, strict=True):
        mask = [False] * len(ids)
        for i, (first, last) in enumerate(touched):
            mask[first:last] = [i < text.num_learnt] * (last - first)
        found.append(Example(ids, mask))
    return found
