"""Check the texts that a conversation is trained on as, and render prompts as they are served where that takes another text.

Some templates write earlier messages otherwise once a turn has been answered: the system text stands in the last user turn alone,
or only if that turn is the last message. Then the rendering of a whole conversation is no text that a model meets. What it meets is
the prompt, rendered up to the user's turn, followed by its answer; each trained turn becomes an example of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator

from moe_train.data.chat.call_ids import differing, has_call_ids, with_other_ids
from moe_train.data.chat.completeness import LeftOut, Rendering
from moe_train.data.chat.example import Turn, by_turn, restart_reason, turns
from moe_train.data.chat.loss_mask import (
    Answers,
    Rewritten,
    Steps,
    Text,
    TurnText,
    joined,
    trained_texts,
)
from moe_train.data.chat.pieces import layers_of_turns
from moe_train.data.chat.rendered_checks import check_rendered
from moe_train.data.chat.renderings import marked_text, request, text_or_raise, without_marks
from moe_train.data.chat.sandbox import Prefix, Request
from moe_train.data.records.normal_form import Conversation
from moe_train.data.tokenizers.huggingface import HuggingFace

ServedSteps = Generator[list[Request], Answers, list[Text] | None]
"""A generator like `Steps`; None if a turn cannot be told apart from its prompt."""


def checked_texts(conversation: Conversation, template: str, tokenizer: HuggingFace) -> Steps:
    """Find the texts that a conversation is trained on as, and check that they are what was said.

    See `trained_texts` and `rendered_checks`. If the texts in which all turns stand together cannot be used, each trained turn is
    rendered behind its own prompt.
    """
    trained = [turn for turn in turns(conversation.messages) if turn.trained_on]
    try:
        texts = yield from trained_texts(conversation, tokenizer)
        ends = [len(conversation.messages)]
        if by_turn(conversation):
            ends = _ends([len(text.turns) for text in texts], trained)
        _check(conversation, texts, ends, template, tokenizer)
        return texts
    except (Rewritten, LeftOut) as problem:
        served = yield from _served_texts(conversation, trained, tokenizer)
        if served is None:
            raise
        try:
            _check(conversation, served, _ends([len(text.trained_on) for text in served], trained), template, tokenizer)
        # Not `Rewritten`, which only `trained_texts` raises.
        except LeftOut:
            # The first problem is about the template as it is; the second only about this way around it.
            raise problem from None
        return served


def _ends(num_turns: list[int], trained: list[Turn]) -> list[int]:
    """Return the number of messages in each text, given how many of the trained turns each contains."""
    return [trained[total - 1].end for total in itertools.accumulate(num_turns)]


def _check(conversation: Conversation, texts: list[Text], ends: list[int], template: str, tokenizer: HuggingFace) -> None:
    """Check texts, given the number of messages in each."""
    renderings = [Rendering(text.text, text.trained_on, end) for text, end in zip(texts, ends, strict=True)]
    check_rendered(conversation, renderings, template, tokenizer)


def _served_texts(conversation: Conversation, trained: list[Turn], tokenizer: HuggingFace) -> ServedSteps:
    """Return the trained turns behind their prompts as they are served; None if one cannot be told apart from its prompt."""
    messages = conversation.messages
    # A first turn without a message before it has no prompt.
    if not trained or trained[0].start == 0:
        return None
    served = yield from _turns_alone(conversation, trained, tokenizer)
    if served is None:
        return None
    if any(map(has_call_ids, messages)):
        variant = conversation._replace(messages=[with_other_ids(message) for message in messages])
        other_ids = yield from _turns_alone(variant, trained, tokenizer)
        if other_ids is None:
            return None
        pairs = zip(served, other_ids, strict=True)
        served = [text._replace(random=differing(text.text, variant_text.text)) for text, variant_text in pairs]
    texts: list[Text] = []
    for i, text in enumerate(served):
        turn_messages = [messages[trained[i].start : trained[i].end]]
        text = text._replace(pieces=layers_of_turns(text.text, text.trained_on, turn_messages, tokenizer.special_pattern))
        if by_turn(conversation):
            text = text._replace(turns=(TurnText(1, text.text[text.end :]),))
        if texts and text.text.startswith(texts[-1].text[: texts[-1].end]):
            texts[-1] = joined(texts[-1], text)
        else:
            restart = restart_reason(messages[trained[i - 1].end : trained[i].start]) if texts else None
            texts.append(text._replace(restart=restart))
    return texts


def _turns_alone(conversation: Conversation, trained: list[Turn], tokenizer: HuggingFace) -> ServedSteps:
    """Return a text for each trained turn; None if one of them cannot be told apart from its prompt."""
    prefixes: list[Prefix] = []
    for turn in trained:
        prefixes += [(turn.start, True), (turn.end, False)]
    (answers,) = yield [request(conversation, prefixes, tokenizer)]
    texts = []
    for i, turn in enumerate(trained):
        prompt, through = (without_marks(text_or_raise(text)) for text in answers[2 * i : 2 * i + 2])
        start: int | None = len(prompt)
        if not through.startswith(prompt):
            last_content = conversation.messages[turn.start - 1].get("content") or ""
            start = None
            # A content with parts is written in pieces, which could not be searched for as one text.
            if isinstance(last_content, str):
                start = _end_of_prompt(prompt, through, marked_text(last_content, tokenizer.special_pattern))
        # What follows the end token is never generated by a model.
        stripped = through.rstrip()
        end = len(stripped) if stripped.endswith(tokenizer.special_tokens) else len(through)
        if start is None or end <= start:
            return None
        text = prompt + through[start:end]
        texts.append(Text(text, [(len(prompt), len(text))], []))
    return texts


def _end_of_prompt(prompt: str, through: str, last_content: str) -> int | None:
    """Return where the prompt ends in the rendering that has its answer.

    Args:
        prompt: The prompt as it is served.
        through: The rendering of prompt and answer.
        last_content: The last message of the prompt, with the marks of a request. Both texts contain it, with the same text behind
            it up to the end of the prompt.

    Returns:
        The position in `through`; None if the texts differ behind the message, too.
    """
    last_content = last_content.strip()
    start = prompt.rfind(last_content)
    if not last_content or start < 0:
        return None
    tail = prompt[start:]
    # The answer may contain the same text once more, so count from the start.
    position = -len(tail)
    for _ in range(max(1, prompt.count(tail))):
        position = through.find(tail, position + len(tail))
        if position < 0:
            return None
    return position + len(tail)
