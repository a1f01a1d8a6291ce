"""Conversations under a Hugging Face tokenizer: its chat template makes the text, and it is found out what is learnt.

Learnt is what the assistant wrote, its end token included: what the template marks with {% generation %}, or else what
a turn adds to the rendering of the turns before it; where both can be had, they have to agree. With tools a conversation
becomes its prefixes, and of each only the last turn is learnt. A call's id is random, and never learnt.

Most templates do nothing with contents but write them. Then texts without tools are rendered once for each order of roles,
with contents left open, and filled in (see `outline`).
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import re
import string
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from moe_train.data import sandbox
from moe_train.data.conversation import Conversation, Message
from moe_train.data.example import Example, bears_loss, turns, uses_tools, without_tools
from moe_train.data.fields import Problem, brief
from moe_train.data.outline import Order, Outline, fill, order_of, outline_of
from moe_train.data.renderer import GENERATION
from moe_train.data.sandbox import Prefix, Request
from moe_train.data.tokenizer import HuggingFace, Marked, Span

# Unicode noncharacters, which no text contains: what was written and looks like a control token stands between these.
_PLAIN = ("\ufdd0", "\ufdd1")
_MARKS = re.compile("[" + "".join(_PLAIN + GENERATION) + "]")


def examples(conversations: Sequence[Conversation], template: str, tokenizer: HuggingFace) -> list[list[Example] | ValueError]:
    """Of each conversation one example where it has no tools, and otherwise one for each turn of the assistant that bears
    loss; or why there is none.

    That is a ValueError (one line) for what the template refuses, and where turns cannot be told apart. Tools need
    `check_has_tools` before. Texts are rendered and encoded for all conversations at once.
    """
    filled = _filled(conversations, template, tokenizer)
    others = [_wanted(each, tokenizer) for each, some in zip(conversations, filled, strict=True) if some is None]
    rendered = iter(_rendered(others, template, tokenizer))
    made = [next(rendered) if some is None else some for some in filled]
    texts = [text for some in made if not isinstance(some, ValueError) for text in some]
    encoded = iter(_encode(texts, tokenizer))
    return [some if isinstance(some, ValueError) else [next(encoded) for _ in some] for some in made]


def prompt(conversation: Conversation, template: str, tokenizer: HuggingFace) -> list[int]:
    """The tokens up to where the assistant's next turn begins."""
    text = _Text(_without_marks(_text(conversation, True, template, tokenizer)), [], [])
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


class _Text(NamedTuple):
    """What is encoded; of its characters, which are learnt, and which are random and never are."""

    text: str
    learnt: list[Span]
    random: list[Span]


class _Written(NamedTuple):
    """The same for the tokenizer; of its spans the first `num_learnt` are learnt, the others random."""

    marked: Marked
    num_learnt: int


class _Asked(NamedTuple):
    """A request, and whether what it is of holds what an escaped mark looks like."""

    request: Request
    escapes: bool


_Steps = Generator[list[_Asked], list[list[str | ValueError]], list[_Text]]
"""Asks for renderings, is told them, and so on until its texts are made. Raises ValueError."""


def _rendered(steps: list[_Steps], template: str, tokenizer: HuggingFace) -> list[list[_Written] | ValueError]:
    """What the steps of each conversation lead to, those of all taken together."""
    found: list[list[_Written] | ValueError] = [[] for _ in steps]
    told: list[tuple[int, list[list[str | ValueError]] | None]] = [(i, None) for i in range(len(steps))]
    while told:
        asking: list[tuple[int, list[_Asked]]] = []
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
        told = [(i, [_told(next(texts), asked) for asked in some]) for i, some in asking]
    return found


def _told(texts: list[str | ValueError], asked: _Asked) -> list[str | ValueError]:
    if not asked.escapes and any(isinstance(text, str) and _ESCAPED in text for text in texts):
        what = r"the chat template writes \u escapes, behind which a control token typed as text cannot be told apart"
        return [ValueError(what)] * len(texts)
    return texts


_ESCAPED = r"\ufdd0"


def _text(conversation: Conversation, prompt: bool, template: str, tokenizer: HuggingFace) -> str:
    asked = _ask(conversation, [(len(conversation.messages), prompt)], tokenizer)
    (text,) = _told(sandbox.render_prefixes(template, [asked.request])[0], asked)
    return _rendering(text)


def _rendering(text: str | ValueError) -> str:
    if isinstance(text, ValueError):
        raise text
    return text


def _ask(conversation: Conversation, prefixes: Sequence[Prefix], tokenizer: HuggingFace, outline: bool = False) -> _Asked:
    """For prefixes of a conversation; what looks like a control token stands between marks. Raises Problem."""
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
    return _Asked(Request(variables, prefixes, outline), escapes)


def _marked(text: str, tokenizer: HuggingFace) -> str:
    """What looks like a control token stands between marks. Raises Problem where the text has such marks."""
    return tokenizer.special_pattern.sub(lambda found: _PLAIN[0] + found[0] + _PLAIN[1], _unmarked(text))


def _unmarked(text: str) -> str:
    if not text.isascii() and _MARKS.search(text):
        what = f"the conversation contains a Unicode noncharacter (U+FDD0 to U+FDD3): {brief(text)}"
        raise Problem("unicode", what, "remove it")
    return text


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


def _without_marks(text: str) -> str:
    return text.replace(GENERATION[0], "").replace(GENERATION[1], "") if GENERATION[0] in text else text


# --- what is learnt --------------------------------------------------------------------------------------------


def _wanted(conversation: Conversation, tokenizer: HuggingFace) -> _Steps:
    messages = conversation.messages
    if uses_tools(conversation):
        parts = [(turn.end, list(range(turn.start, turn.end))) for turn in turns(messages) if turn.bears_loss]
    else:
        parts = [(len(messages), [i for i, message in enumerate(messages) if bears_loss(message)])]
    others = [_with_other_ids(messages[:end], learnt) for end, learnt in parts]
    # Everything in one go, but some templates take no prefixes, and need not.
    prefixes = [prefix for end, learnt in reversed(parts) for prefix in ((end, False), *_around(learnt))]
    asked = [_ask(conversation, list(dict.fromkeys(prefixes)), tokenizer)] if parts else []
    asked += [_ask(Conversation(other, conversation.tools), [(len(other), False)], tokenizer) for other in others if other]
    answers = yield asked
    known = dict(zip(asked[0].request.prefixes, answers[0], strict=True)) if parts else {}
    variants = iter(answers[1:])
    texts = []
    for (end, learnt), other in zip(parts, others, strict=True):
        renderings = _Renderings(Conversation(messages[:end], conversation.tools), known, tokenizer)
        texts.append((yield from _part(renderings, learnt, _rendering(next(variants)[0]) if other else None)))
    return texts


class _Renderings(NamedTuple):
    """What is known of the texts of a conversation's prefixes."""

    conversation: Conversation
    known: dict[Prefix, str | ValueError]
    tokenizer: HuggingFace


def _part(renderings: _Renderings, learnt: list[int], other: str | None) -> Generator[Any, Any, _Text]:
    """other: the rendering with other ids."""
    messages = renderings.conversation.messages
    marked = _rendering(renderings.known[len(messages), False])
    text = _without_marks(marked)
    random = [] if other is None else _differing(text, _without_marks(other))
    if GENERATION[0] not in marked:
        return _Text(text, (yield from _prefix_spans(text, renderings, learnt)), random)
    try:
        added = yield from _prefix_spans(text, renderings, learnt)
    except ValueError:  # which is why templates have marks
        return _Text(text, _generation_spans(marked, messages, learnt, None), random)
    spans = _generation_spans(marked, messages, learnt, added)
    _check_agree(text, spans, added)
    return _Text(text, spans, random)


def _around(messages: list[int]) -> list[Prefix]:
    """The prefixes before and through each message."""
    return [(end, end == i) for i in messages for end in (i, i + 1)]


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


def _prefix_spans(text: str, renderings: _Renderings, learnt: list[int]) -> Generator[Any, Any, list[Span]]:
    """What each learnt message adds to the rendering of the messages before it.

    A template may put something before the last user's turn (Mistral's v3 the system text), so that a turn stands
    further on in the whole text than in its prefix. Then it is found by its end token, which nothing else has.
    """
    added = _added(renderings, learnt)
    if all(through is not None and text.startswith(through) for through, _, _ in added.values()):
        return [(start, end) for _, start, end in added.values()]
    conversation, known, tokenizer = renderings
    said = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if missing := [prefix for prefix in _around(said) if prefix not in known]:
        (answers,) = yield [_ask(conversation, missing, tokenizer)]
        known.update(zip(missing, answers, strict=True))
    spans = []
    position = 0
    for i, (through, start, end) in _added(renderings, said).items():
        turn = "" if through is None else through[start:end]
        found = text.find(turn, position) if turn.endswith(tokenizer.special_tokens) else -1
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
    found: dict[int, tuple[str | None, int, int]] = {}
    for i in wanted:
        before, through = (_without_marks(_rendering(renderings.known[prefix])) for prefix in _around([i]))
        # What follows the end token up to the next turn (ChatML's newline) is never generated.
        stripped = through.rstrip()
        ended = len(stripped) > len(before) and stripped.endswith(renderings.tokenizer.special_tokens)
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


def _with_other_ids(messages: list[Message], learnt: list[int]) -> list[Message]:
    """The messages with every character of the learnt calls' ids another one; none where nothing changes."""
    changed = list(messages)
    calling = [i for i in learnt if "tool_calls" in messages[i]]
    for i in calling:
        calls = [call | {"id": call["id"].translate(_OTHER)} if "id" in call else call for call in messages[i]["tool_calls"]]
        changed[i] = messages[i] | {"tool_calls": calls}
    return changed if any(changed[i] != messages[i] for i in calling) else []


def _differing(text: str, other: str) -> list[Span]:
    """Where the ids of learnt calls stand: what changes in the text when every character of them does."""
    if len(other) != len(text):
        raise ValueError("the chat template writes calls differently for different ids, so that what is random cannot be told")
    spans: list[Span] = []
    for i, (a, b) in enumerate(zip(text, other, strict=True)):
        if a != b:
            spans.append((spans.pop()[0] if spans and spans[-1][1] == i else i, i + 1))
    return spans


_KINDS = (string.digits, string.ascii_lowercase, string.ascii_uppercase)
_OTHER = str.maketrans("".join(_KINDS), "".join(kind[1:] + kind[0] for kind in _KINDS))


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
            text = fill(outline, [_unmarked(message["content"]) for message in messages])
            found.append([_Written(text, len(text.spans))])
        except ValueError as error:
            found.append(error)
    return found


@functools.lru_cache(maxsize=8)
def _outlines(template: str, tokenizer: HuggingFace) -> dict[Order, Outline | None]:
    """Those made so far; None where texts have to be rendered one by one."""
    return {}


_MOST_OUTLINES = 1 << 12


def _outlined(order: Order, tokenizer: HuggingFace) -> _Steps:
    """The text of conversations of that order with their contents left open. Raises ValueError where what is learnt, or
    what the text is, may depend on them."""
    messages = [{"role": role, "content": "" if empty else "any"} for role, _, empty in order]
    learnt = [i for i, (_, learnt, _) in enumerate(order) if learnt]
    prefixes = list(dict.fromkeys([(len(order), False), *_around(learnt)]))
    (answers,) = yield [_ask(Conversation(messages, []), prefixes, tokenizer, outline=True)]
    renderings = _Renderings(Conversation(messages, []), dict(zip(prefixes, answers, strict=True)), tokenizer)
    text = _without_marks(_rendering(renderings.known[len(order), False]))
    for through, _, end in _added(renderings, learnt).values():
        if through is None or not text.startswith(through) or not through[:end].endswith(tokenizer.special_tokens):
            raise ValueError("where the assistant's turns stand may depend on what is said")
    return [(yield from _part(renderings, learnt, None))]


# --- text to ids -----------------------------------------------------------------------------------------------


_SPLIT = re.compile("[" + "".join(_PLAIN) + "]")


def _written(text: _Text, tokenizer: HuggingFace) -> _Written:
    """With marks around control tokens instead of around what is none."""
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
