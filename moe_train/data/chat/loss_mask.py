"""Find the characters of a rendered conversation that are trained on.

They are what the assistant wrote, end token included: the parts that the template marks with {% generation %}, or otherwise
what a turn adds to the rendering of the turns before it. If both are available, they have to agree. The id of a call is random,
and never trained on.

What a template writes before a turn may depend on the position of the turn where there are tools, and the reasoning of earlier
turns may be left out. A conversation with tools or reasoning is therefore rendered up to each turn that is trained on, and turns
share a text if their renderings continue one another.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import NamedTuple

from moe_train.data.chat.call_ids import differing, has_call_ids, with_other_ids
from moe_train.data.chat.environment import GENERATION
from moe_train.data.chat.example import by_turn, is_trained_on, restart_reason, turns
from moe_train.data.chat.pieces import Layer, layers_of_turns
from moe_train.data.chat.renderings import PLAIN_TEXT_MARKS, request, text_or_raise, without_marks
from moe_train.data.chat.sandbox import Prefix, Request
from moe_train.data.records.normal_form import Conversation, Message
from moe_train.data.records.problem import Problem, brief
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.tokenizer import Span


class TurnText(NamedTuple):
    """A trained turn of a conversation with tools or reasoning, in the text that it shares with other turns."""

    num_spans: int
    """Number of the text's trained spans up to the end of the turn."""
    after: str
    """What the conversation up to this turn has after the turn; it is not trained on."""


class Text(NamedTuple):
    """A text to encode."""

    text: str
    trained_on: list[Span]
    """Spans of characters that are trained on."""
    random: list[Span]
    """Spans of characters that are random and never trained on."""
    turns: tuple[TurnText, ...] = ()
    """For a conversation with tools or reasoning: the turns that share the text, in order."""
    restart: str | None = None
    """Why the text does not continue the one before; None for the first text of a conversation."""
    pieces: tuple[Layer, ...] = ()
    """For turns of which only pieces are trained on: the layers of their texts (`pieces`)."""

    @property
    def end(self) -> int:
        """Number of characters up to the end of what is trained on."""
        return self.trained_on[-1][1] if self.trained_on else len(self.text)


Answers = list[list[str | ValueError]]
"""For each request its renderings, or the error in the place of one."""
Steps = Generator[list[Request], Answers, list[Text]]
"""A generator that yields rendering requests, is sent the renderings, may ask again, and returns texts, or raises ValueError.
It is a generator so that the requests of many conversations can be sent to the sandbox at once.
"""
TextSteps = Generator[list[Request], Answers, Text]
"""A generator like `Steps` that returns one text."""
SpanSteps = Generator[list[Request], Answers, list[Span]]
"""A generator like `Steps` that returns spans of one text."""


def trained_texts(conversation: Conversation, tokenizer: HuggingFace) -> Steps:
    """Find the texts that a conversation is trained on as: one, or with tools or reasoning as few as its renderings allow."""
    messages = conversation.messages
    in_turn = by_turn(conversation)
    if in_turn:
        parts = [(turn.end, list(range(turn.start, turn.end))) for turn in turns(messages) if turn.trained_on]
    else:
        parts = [(len(messages), [i for i, message in enumerate(messages) if is_trained_on(message)])]
    if not parts:
        return []
    # Request all prefixes at once. Some templates refuse prefixes; that is an error only if the prefixes are needed.
    prefixes: list[Prefix] = []
    # Longest first: the sandbox sends a later text that is a prefix of the first one as its length alone.
    for end, trained_on in reversed(parts):
        prefixes += [(end, False), *_around(trained_on)]
    requests = [request(conversation, list(dict.fromkeys(prefixes)), tokenizer)]
    answers = yield requests
    rendered = dict(zip(requests[0].prefixes, answers[0], strict=True))
    texts: list[Text] = []
    ends: list[int] = []
    for end, trained_on in parts:
        # `rendered` is shared by all parts: `_prefix_spans` adds to it what it has to ask for.
        renderings = _Renderings(Conversation(messages[:end], conversation.tools, conversation.settings), rendered, tokenizer)
        text = yield from _trained_text(renderings, trained_on)
        layers = layers_of_turns(text.text, text.trained_on, [[messages[i]] for i in trained_on], tokenizer.special_pattern)
        text = text._replace(pieces=layers)
        if in_turn:
            text = text._replace(turns=(TurnText(len(text.trained_on), text.text[text.end :]),))
        # Compared only up to the end of the earlier turn: what follows it there (`TurnText.after`) is not trained on.
        if texts and text.text.startswith(texts[-1].text[: texts[-1].end]):
            texts[-1] = joined(texts[-1], text)
            ends[-1] = end
        else:
            restart = restart_reason(messages[ends[-1] : trained_on[0]]) if texts else None
            texts.append(text._replace(restart=restart))
            ends.append(end)
    # Without ids nothing in the texts is random, and a second rendering would find nothing.
    if not any(has_call_ids(messages[i]) for _, trained_on in parts for i in trained_on):
        return texts
    return (yield from _with_random(texts, ends, conversation, tokenizer))


def joined(before: Text, text: Text) -> Text:
    """Return a text with the turns of the text before, which it continues."""
    num_spans = len(before.trained_on)
    turn_texts = [turn._replace(num_spans=num_spans + turn.num_spans) for turn in text.turns]
    return text._replace(
        trained_on=before.trained_on + text.trained_on,
        pieces=before.pieces + text.pieces,
        turns=(*before.turns, *turn_texts),
        restart=before.restart,
    )


def _with_random(texts: list[Text], ends: list[int], conversation: Conversation, tokenizer: HuggingFace) -> Steps:
    """Find the ids of calls in texts, given the number of messages in each text: what changes when all ids are replaced."""
    messages, tools, settings = conversation
    variant = Conversation([with_other_ids(message) for message in messages], tools, settings)
    # Longest first, as in `trained_texts`.
    (answers,) = yield [request(variant, [(end, False) for end in reversed(ends)], tokenizer)]
    results = []
    for text, rendered in zip(texts, reversed(answers), strict=True):
        results.append(text._replace(random=differing(text.text, without_marks(text_or_raise(rendered)))))
    return results


class Rewritten(Problem):
    """A template renders earlier messages otherwise once a turn has been answered."""


class _Renderings(NamedTuple):
    """The renderings of a conversation's prefixes so far."""

    conversation: Conversation
    rendered: dict[Prefix, str | ValueError]
    tokenizer: HuggingFace


def _trained_text(renderings: _Renderings, trained_on: list[int]) -> TextSteps:
    """Return the text of one prefix, with the spans that are trained on.

    Args:
        renderings: The conversation, and its renderings so far.
        trained_on: Indices of the messages that are trained on.
    """
    messages = renderings.conversation.messages
    marked = text_or_raise(renderings.rendered[len(messages), False])
    text = without_marks(marked)
    if GENERATION[0] not in marked:
        return Text(text, (yield from _prefix_spans(text, renderings, trained_on)), [])
    try:
        added = yield from _prefix_spans(text, renderings, trained_on)
    except ValueError:  # the turns cannot be located by prefixes, so rely on the marks
        return Text(text, _generation_spans(marked, messages, trained_on, None), [])
    spans = _generation_spans(marked, messages, trained_on, added)
    _check_agree(text, spans, added)
    return Text(text, spans, [])


def _around(messages: list[int]) -> list[Prefix]:
    """Return the prefix before and the prefix through each message."""
    prefixes: list[Prefix] = []
    for i in messages:
        prefixes += [(i, True), (i + 1, False)]
    return prefixes


def _generation_spans(marked: str, messages: list[Message], trained_on: list[int], added: list[Span] | None) -> list[Span]:
    """Return the spans between the template's marks for the trained messages, as characters of the text without marks.

    Args:
        marked: The rendering, with marks.
        messages: All messages.
        trained_on: Indices of the messages that are trained on.
        added: What these messages add to the rendering of the messages before them; None if unknown.

    Raises:
        ValueError: If the marks cannot be matched to the messages.
    """
    pieces = re.split("[" + "".join(GENERATION) + "]", marked)
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    # The text is outside and inside the marks in turn, and begins outside.
    spans = [(ends[i], ends[i + 1]) for i in range(1, len(pieces), 2)]
    assistant_messages = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    # With every assistant message trained on, all that is marked is: a template may mark one message in several parts.
    if trained_on == assistant_messages:
        return spans
    if len(spans) == len(assistant_messages):
        return [span for i, span in zip(assistant_messages, spans, strict=True) if i in trained_on]
    if added is not None:
        return [span for span in spans if _is_inside(span, added)]
    message = f"the chat template marks {len(spans)} generations for {len(assistant_messages)} assistant messages"
    raise Problem(
        "template",
        f"{message}, of which {len(trained_on)} bear loss",
        "put one {% generation %} … {% endgeneration %} around each message",
    )


def _is_inside(span: Span, outer_spans: list[Span]) -> bool:
    """Return whether a span is within one of the others."""
    return any(start <= span[0] and span[1] <= end for start, end in outer_spans)


def _prefix_spans(text: str, renderings: _Renderings, trained_on: list[int]) -> SpanSteps:
    """Return the span that each trained message adds to the rendering of the messages before it.

    A template may insert something before the last user turn (Mistral's v3 inserts the system text there), so that a turn is at a
    later position in the whole text than in its prefix. Such a turn is found by its text, which has to end with an end token.
    """
    added = _added_spans(renderings, trained_on)
    if all(through is not None and text.startswith(through) for through, _, _ in added.values()):
        return [(start, end) for _, start, end in added.values()]
    conversation, rendered, tokenizer = renderings
    assistant_messages = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    # Searching by text has to go through all assistant turns in order, since two turns may have the same text.
    missing = [prefix for prefix in _around(assistant_messages) if prefix not in rendered]
    if missing:
        (answers,) = yield [request(conversation, missing, tokenizer)]
        rendered.update(zip(missing, answers, strict=True))
    spans = []
    position = 0
    for i, (through, start, end) in _added_spans(renderings, assistant_messages).items():
        turn = "" if through is None else through[start:end]
        turn_start = -1
        # Without an end token, a short text such as "Yes" could be found within another turn.
        if turn.endswith(tokenizer.special_tokens):
            turn_start = text.find(turn, position)
        if turn_start < 0:
            message = f"the chat template renders the turns before message {i} differently once it is there"
            raise Rewritten(
                "template",
                f"{message}, so its tokens cannot be told apart",
                "put {% generation %} … {% endgeneration %} around the assistant's part of the template",
            )
        position = turn_start + len(turn)
        if i in trained_on:
            spans.append((turn_start, position))
    return spans


def _added_spans(renderings: _Renderings, indices: list[int]) -> dict[int, tuple[str | None, int, int]]:
    """Locate what each of these messages adds to its prefix.

    Returns:
        For each message, the text through it, and the start and end of the message in that text. The text is None if it does not
        begin with the rendering of the messages before, so that the message cannot be located.
    """
    added_spans: dict[int, tuple[str | None, int, int]] = {}
    for i in indices:
        before, through = (without_marks(text_or_raise(renderings.rendered[prefix])) for prefix in _around([i]))
        # What follows the end token before the next turn, such as ChatML's newline, is never generated by a model.
        stripped = through.rstrip()
        # If the turn adds only white space, the special token at the end is that of the turn before.
        ended = len(stripped) > len(before) and stripped.endswith(renderings.tokenizer.special_tokens)
        end = len(stripped) if ended else len(through)
        # `before` ends with the generation prompt; a template may write another one once the turn is there.
        located_in = through if through.startswith(before) else None
        added_spans[i] = (located_in, len(before), end)
    return added_spans


def _check_agree(text: str, spans: list[Span], added: list[Span]) -> None:
    """Raise ValueError if the template's marks and the prefixes differ in more than white space."""
    if spans == added:
        return
    marked_characters = _characters(spans)
    added_characters = _characters(added)
    for difference, verb in ((marked_characters - added_characters, "marks"), (added_characters - marked_characters, "leaves out")):
        differing = "".join(text[i] for i in sorted(difference)).strip("".join(PLAIN_TEXT_MARKS) + " \t\r\n")
        if differing:
            message = f"the chat template's {{% generation %}} {verb} {brief(differing)}"
            raise Problem(
                "template",
                f"{message}, unlike what the assistant's turns add to the rendering",
                "put it around what the assistant writes, the end token included",
            )


def _characters(spans: list[Span]) -> set[int]:
    """Return the positions of all characters in the spans."""
    positions: set[int] = set()
    for start, end in spans:
        positions.update(range(start, end))
    return positions
