"""Conversations under a Hugging Face tokenizer: its chat template makes the text, and it is found out what is learnt.

Learnt is what the assistant wrote, its end token included: what the template marks with {% generation %}, or else what
a turn adds to the rendering of the turns before it; where both can be had, they have to agree. With tools a conversation
becomes its prefixes, and of each only the last turn is learnt. A call's id is random, and never learnt.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import string
from typing import Any

import numpy as np

from moe_train.data import sandbox
from moe_train.data.conversation import Conversation, Message
from moe_train.data.example import Example, bears_loss, turns, uses_tools, without_tools
from moe_train.data.fields import Problem, brief
from moe_train.data.sandbox import GENERATION
from moe_train.data.tokenizer import HuggingFace

# Unicode noncharacters, which no text contains: what was written and looks like a control token stands between these.
_PLAIN = ("\ufdd0", "\ufdd1")
_MARKS = re.compile("[" + "".join(_PLAIN + GENERATION) + "]")
Span = tuple[int, int]  # characters (start, end)


def examples(conversation: Conversation, template: str, tokenizer: HuggingFace) -> list[Example]:
    """One example for a conversation without tools; otherwise one for each turn of the assistant that bears loss.

    Raises ValueError (one line) for what the template refuses, and where turns cannot be told apart. Tools need
    `check_has_tools` before.
    """
    messages, tools = conversation
    if not uses_tools(conversation):
        return [_example(conversation, [i for i, message in enumerate(messages) if bears_loss(message)], template, tokenizer)]
    return [
        _example(Conversation(messages[: turn.end], tools), list(range(turn.start, turn.end)), template, tokenizer)
        for turn in turns(messages)
        if turn.bears_loss
    ]


def prompt(conversation: Conversation, template: str, tokenizer: HuggingFace) -> list[int]:
    """The tokens up to where the assistant's next turn begins."""
    (text,) = _texts([(conversation, True)], template, tokenizer)
    return _encode(_without(text, GENERATION), [], [], tokenizer).tokens


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
        (text,) = _texts([(Conversation(messages, [{"type": "function", "function": function}]), False)], template, tokenizer)
    except ValueError as error:
        raise without_tools(f"the chat template takes none ({error})") from error
    for what, shown in (("tools", "Look a word up."), ("calls", "quokka"), ("results", "marsupial")):
        if shown not in text:
            raise without_tools(f"the chat template leaves {what} out")
    for token in re.findall(r"\[/?[A-Z_]+\]", text):
        if len(tokenizer.encode_control([token])[0]) != 1:
            raise without_tools(f"the chat template writes {token}, which {tokenizer.files[0]} has no token for")


def _example(conversation: Conversation, learnt: list[int], template: str, tokenizer: HuggingFace) -> Example:
    """learnt: the messages that are."""
    renderings = _Renderings(conversation, template, tokenizer)
    whole = len(conversation.messages), False
    with contextlib.suppress(ValueError):  # all in one go, but some templates take no prefixes, and need not
        renderings.get([whole, *_around(learnt)])
    (marked,) = renderings.get([whole])
    text = _without(marked, GENERATION)
    random = _random_spans(text, conversation, learnt, template, tokenizer)
    if GENERATION[0] not in marked:
        return _encode(text, _prefix_spans(text, renderings, learnt), random, tokenizer)
    try:
        added = _prefix_spans(text, renderings, learnt)
    except ValueError:  # which is why templates have marks
        return _encode(text, _generation_spans(marked, conversation.messages, learnt, None), random, tokenizer)
    spans = _generation_spans(marked, conversation.messages, learnt, added)
    _check_agree(text, spans, added)
    return _encode(text, spans, random, tokenizer)


Prefix = tuple[int, bool]
"""How many messages, and whether the assistant comes next."""


def _around(messages: list[int]) -> list[Prefix]:
    """The prefixes before and through each message."""
    return [(end, end == i) for i in messages for end in (i, i + 1)]


class _Renderings:
    """The texts of a conversation's prefixes, each made once."""

    def __init__(self, conversation: Conversation, template: str, tokenizer: HuggingFace) -> None:
        self.messages, self.tools = conversation
        self.template, self.tokenizer = template, tokenizer
        self._known: dict[Prefix, str] = {}

    def get(self, wanted: list[Prefix]) -> list[str]:
        missing = [prefix for prefix in dict.fromkeys(wanted) if prefix not in self._known]
        if missing:
            conversations = [(Conversation(self.messages[:end], self.tools), prompt) for end, prompt in missing]
            self._known |= zip(missing, _texts(conversations, self.template, self.tokenizer), strict=True)
        return [self._known[prefix] for prefix in wanted]


def _texts(conversations: list[tuple[Conversation, bool]], template: str, tokenizer: HuggingFace) -> list[str]:
    """The template's text of each (conversation, whether the assistant comes next), with both kinds of marks in it."""
    escaped = r"\ufdd0"
    written = False  # by whoever made the record, and not by a template that escapes the mark

    def marked(value: Any) -> Any:
        match value:
            case str():
                if _MARKS.search(value):
                    what = f"the conversation contains a Unicode noncharacter (U+FDD0 to U+FDD3): {brief(value)}"
                    raise Problem("unicode", what, "remove it")
                nonlocal written
                written |= escaped in value
                return tokenizer.special_pattern.sub(rf"{_PLAIN[0]}\g<0>{_PLAIN[1]}", value)
            case list():
                return [marked(item) for item in value]
            case dict():
                return {marked(key): item if key in ("role", "id", "tool_call_id") else marked(item) for key, item in value.items()}
        return value

    def variables(conversation: Conversation, add_generation_prompt: bool) -> dict[str, Any]:
        return {
            "messages": [marked(_as_templates_read(message)) for message in conversation.messages],
            "tools": marked(conversation.tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **tokenizer.named_tokens,
        }

    texts = sandbox.render(template, [variables(*wanted) for wanted in conversations])
    if not written and any(escaped in text for text in texts):
        raise ValueError(r"the chat template writes \u escapes, behind which a control token typed as text cannot be told apart")
    return texts


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


def _without(text: str, marks: tuple[str, str]) -> str:
    return text.replace(marks[0], "").replace(marks[1], "")


# --- what is learnt --------------------------------------------------------------------------------------------


def _generation_spans(marked: str, messages: list[Message], learnt: list[int], added: list[Span] | None) -> list[Span]:
    """What stands between the marks of the learnt messages, as characters of the text without these marks."""
    pieces = re.split("[" + "".join(GENERATION) + "]", marked)
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    spans = [(ends[i], ends[i + 1]) for i in range(1, len(pieces), 2)]
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if learnt == said:
        return spans
    if len(spans) == len(said):
        return [span for i, span in zip(said, spans, strict=True) if i in learnt]
    if added is not None:
        return [span for span in spans if any(start <= span[0] and span[1] <= end for start, end in added)]
    raise ValueError(
        f"the chat template marks {len(spans)} generations for {len(said)} assistant messages, of which {len(learnt)} bear loss; "
        "put one {% generation %} … {% endgeneration %} around each message"
    )


def _prefix_spans(text: str, renderings: _Renderings, learnt: list[int]) -> list[Span]:
    """What each learnt message adds to the rendering of the messages before it.

    A template may put something before the last user's turn (Mistral's v3 the system text), so that a turn stands
    further on in the whole text than in its prefix. Then it is found by its end token, which nothing else has.
    """
    added = _added(renderings, learnt)
    if all(through is not None and text.startswith(through) for through, _, _ in added.values()):
        return [(start, end) for _, start, end in added.values()]
    said = [i for i, message in enumerate(renderings.messages) if message["role"] == "assistant"]
    spans = []
    position = 0
    for i, (through, start, end) in _added(renderings, said).items():
        turn = "" if through is None else through[start:end]
        ended = any(turn.endswith(token) for token in renderings.tokenizer.special_tokens)
        found = text.find(turn, position) if ended else -1
        if found < 0:
            raise ValueError(
                f"the chat template renders the turns before message {i} differently once it is there, so its tokens cannot "
                "be told apart; put {% generation %} … {% endgeneration %} around the assistant's part of the template"
            )
        position = found + len(turn)
        if i in learnt:
            spans.append((found, position))
    return spans


def _added(renderings: _Renderings, wanted: list[int]) -> dict[int, tuple[str | None, int, int]]:
    """For each wanted message: the text through it, and where in that it starts and ends; None where it cannot be told."""
    texts = [_without(text, GENERATION) for text in renderings.get(_around(wanted))]
    found: dict[int, tuple[str | None, int, int]] = {}
    for i, before, through in zip(wanted, texts[::2], texts[1::2], strict=True):
        # What follows the end token up to the next turn (ChatML's newline) is never generated.
        stripped = through.rstrip()
        ended = len(stripped) > len(before) and any(stripped.endswith(token) for token in renderings.tokenizer.special_tokens)
        end = len(stripped) if ended else len(through)
        found[i] = (through if through.startswith(before) else None), len(before), end
    return found


def _check_agree(text: str, spans: list[Span], added: list[Span]) -> None:
    """Raise ValueError where marks and prefixes differ in more than space."""
    marked, grown = ({i for start, end in some for i in range(start, end)} for some in (spans, added))
    for only, said in ((marked - grown, "marks"), (grown - marked, "leaves out")):
        if differing := "".join(text[i] for i in sorted(only)).strip("".join(_PLAIN) + " \t\r\n"):
            raise ValueError(
                f"the chat template's {{% generation %}} {said} {brief(differing)}, unlike what the assistant's turns add to the "
                "rendering; put it around what the assistant writes, the end token included"
            )


def _random_spans(text: str, conversation: Conversation, learnt: list[int], template: str, tokenizer: HuggingFace) -> list[Span]:
    """Where the ids of learnt calls stand: what changes in the text when every character of them does."""
    messages = list(conversation.messages)
    for i in learnt:
        if "tool_calls" in messages[i]:
            calls = [call | {"id": call["id"].translate(_OTHER)} if "id" in call else call for call in messages[i]["tool_calls"]]
            messages[i] = messages[i] | {"tool_calls": calls}
    if messages == conversation.messages:
        return []
    (marked,) = _texts([(Conversation(messages, conversation.tools), False)], template, tokenizer)
    other = _without(marked, GENERATION)
    if len(other) != len(text):
        raise ValueError("the chat template writes calls differently for different ids, so that what is random cannot be told")
    return [(i, i + 1) for i, (a, b) in enumerate(zip(text, other, strict=True)) if a != b]


_KINDS = (string.digits, string.ascii_lowercase, string.ascii_uppercase)
_OTHER = str.maketrans("".join(_KINDS), "".join(kind[1:] + kind[0] for kind in _KINDS))


# --- text to ids -----------------------------------------------------------------------------------------------


def _encode(text: str, spans: list[Span], random: list[Span], tokenizer: HuggingFace) -> Example:
    """Ids of `text`; those that touch a span bear loss, unless they touch a random one. Plain marks: encoded as plain text."""
    learnt = np.zeros(len(text) + 1, bool)
    never = np.zeros(len(text) + 1, bool)
    for some, flags in ((spans, learnt), (random, never)):
        for start, end in some:
            flags[start:end] = True
    pieces = re.split("[" + "".join(_PLAIN) + "]", text)
    marks = np.cumsum([len(piece) + 1 for piece in pieces])[:-1] - 1
    before = [np.concatenate(([0], np.cumsum(np.delete(flags, marks)))) for flags in (learnt, never)]  # of each character
    tokens, offsets = tokenizer.encode_control(pieces)
    # A token without characters of its own counts as one character long.
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    ends = np.maximum(ends, starts + 1)
    touches, is_random = ((count[ends] - count[starts]) > 0 for count in before)
    return Example(tokens, (touches & ~is_random).tolist())
