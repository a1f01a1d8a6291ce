"""Which characters of a rendered conversation are learnt.

What the assistant wrote, its end token included: what the template marks with {% generation %}, or else what a turn adds to
the rendering of the turns before it; where both can be had, they have to agree. With tools a conversation becomes its
prefixes, and of each only the last turn is learnt. A call's id is random, and never learnt.
"""

from __future__ import annotations

import re
import string
from collections.abc import Generator
from typing import Any, NamedTuple

from moe_train.data.chat.example import bears_loss, turns, uses_tools
from moe_train.data.chat.renderer import GENERATION
from moe_train.data.chat.renderings import PLAIN, request, text_or_raise, without_marks
from moe_train.data.chat.sandbox import Prefix, Request
from moe_train.data.records.conversation import Conversation, Message
from moe_train.data.records.problem import brief
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.tokenizer import Span


class Text(NamedTuple):
    """What is encoded; of its characters, which are learnt, and which are random and never are."""

    text: str
    learnt: list[Span]
    random: list[Span]


Steps = Generator[list[Request], list[list[str | ValueError]], list[Text]]
"""A generator: it yields what is to be rendered, is sent the renderings, maybe asks again, and returns texts. So that the
requests of many conversations can cross to the sandbox at once. Raises ValueError."""


def learnt_texts(conversation: Conversation, tokenizer: HuggingFace) -> Steps:
    """The texts that a conversation is trained as: one, or with tools one for each turn of the assistant that bears loss."""
    messages = conversation.messages
    if uses_tools(conversation):
        parts = [(turn.end, list(range(turn.start, turn.end))) for turn in turns(messages) if turn.bears_loss]
    else:
        parts = [(len(messages), [i for i, message in enumerate(messages) if bears_loss(message)])]
    others = [_with_other_ids(messages[:end], learnt) for end, learnt in parts]
    # Everything in one go, but some templates take no prefixes, and need not.
    prefixes = [prefix for end, learnt in reversed(parts) for prefix in ((end, False), *_around(learnt))]
    asked = [request(conversation, list(dict.fromkeys(prefixes)), tokenizer)] if parts else []
    asked += [request(Conversation(other, conversation.tools), [(len(other), False)], tokenizer) for other in others if other]
    answers = yield asked
    known = dict(zip(asked[0].prefixes, answers[0], strict=True)) if parts else {}
    variants = iter(answers[1:])
    texts = []
    for (end, learnt), other in zip(parts, others, strict=True):
        renderings = _Renderings(Conversation(messages[:end], conversation.tools), known, tokenizer)
        texts.append((yield from _learnt_text(renderings, learnt, text_or_raise(next(variants)[0]) if other else None)))
    return texts


class _Renderings(NamedTuple):
    """What is known of the texts of a conversation's prefixes."""

    conversation: Conversation
    known: dict[Prefix, str | ValueError]
    tokenizer: HuggingFace


def _learnt_text(renderings: _Renderings, learnt: list[int], other: str | None) -> Generator[Any, Any, Text]:
    """The text of one of them, with what is learnt of it; `other` is its rendering with other ids of calls, if it has any."""
    messages = renderings.conversation.messages
    marked = text_or_raise(renderings.known[len(messages), False])
    text = without_marks(marked)
    random = [] if other is None else _differing(text, without_marks(other))
    if GENERATION[0] not in marked:
        return Text(text, (yield from _prefix_spans(text, renderings, learnt)), random)
    try:
        added = yield from _prefix_spans(text, renderings, learnt)
    except ValueError:  # which is why templates have marks
        return Text(text, _generation_spans(marked, messages, learnt, None), random)
    spans = _generation_spans(marked, messages, learnt, added)
    _check_agree(text, spans, added)
    return Text(text, spans, random)


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
    added = _added_spans(renderings, learnt)
    if all(through is not None and text.startswith(through) for through, _, _ in added.values()):
        return [(start, end) for _, start, end in added.values()]
    conversation, known, tokenizer = renderings
    said = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if missing := [prefix for prefix in _around(said) if prefix not in known]:
        (answers,) = yield [request(conversation, missing, tokenizer)]
        known.update(zip(missing, answers, strict=True))
    spans = []
    position = 0
    for i, (through, start, end) in _added_spans(renderings, said).items():
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


def _added_spans(renderings: _Renderings, wanted: list[int]) -> dict[int, tuple[str | None, int, int]]:
    """For each wanted message: the text through it, and where in that it starts and ends; None where it cannot be told."""
    found: dict[int, tuple[str | None, int, int]] = {}
    for i in wanted:
        before, through = (without_marks(text_or_raise(renderings.known[prefix])) for prefix in _around([i]))
        # What follows the end token up to the next turn (ChatML's newline) is never generated.
        stripped = through.rstrip()
        ended = len(stripped) > len(before) and stripped.endswith(renderings.tokenizer.special_tokens)
        end = len(stripped) if ended else len(through)
        found[i] = (through if through.startswith(before) else None), len(before), end
    return found


def _check_agree(text: str, spans: list[Span], added: list[Span]) -> None:
    """Raise ValueError where marks and prefixes differ in more than space."""
    if spans == added:
        return
    marked, grown = ({i for start, end in some for i in range(start, end)} for some in (spans, added))
    for only, said in ((marked - grown, "marks"), (grown - marked, "leaves out")):
        if differing := "".join(text[i] for i in sorted(only)).strip("".join(PLAIN) + " \t\r\n"):
            raise ValueError(
                f"the chat template's {{% generation %}} {said} {brief(differing)}, unlike what the assistant's turns add to the "
                "rendering; put it around what the assistant writes, the end token included"
            )


def _with_other_ids(messages: list[Message], learnt: list[int]) -> list[Message]:
    """The messages with every character of the learnt calls' ids another one; none where nothing changes."""
    calling = [i for i in learnt if "tool_calls" in messages[i]]
    if not calling:
        return []
    changed = list(messages)
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
