"""Convert preference pairs and labelled answers to examples of several segments.

A pair is one example: the segments of prompt + chosen (answer 1), then those of prompt + rejected (answer 2). An answer has more
than one segment only where the turns of a trajectory with tools or reasoning do not continue one another; its log-probability is
the sum over them. The loss mask covers the tokens of the answers, as it would in supervised training.

`Example.values` of a pair are (margin, positions that all its segments share). Those of a labelled answer are (label, hash of the
prompt, tokens of the prompt, tokens of the first segment).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from moe_train.data.chat import conversation_to_tokens
from moe_train.data.chat.example import SEGMENT_START, Example
from moe_train.data.records.answers import judged_conversations, judged_messages
from moe_train.data.records.normal_form import ROLES, LabelledAnswer, Message, PreferencePair, reasoning_of, texts_of
from moe_train.data.records.problem import Problem, brief
from moe_train.data.tokenizers.tokenizer import Tokenizer


def pair_examples_batch(
    records: Sequence[PreferencePair | LabelledAnswer], template: str | None, tokenizer: Tokenizer
) -> list[list[Example] | ValueError]:
    """Return the example of each record, in a list, or the ValueError that says why it cannot be used.

    Args:
        records: pairs and labelled answers.
        template: The chat template; None for a Mistral tokenizer.
        tokenizer: The tokenizer.
    """
    groups = [judged_conversations(record) for record in records]
    # One call for all conversations, since a chat template is rendered in a sandbox that is entered once for a batch.
    conversations = [conversation for group in groups for conversation in group]
    tokenized = iter(conversation_to_tokens.examples_batch(conversations, template, tokenizer))
    results: list[list[Example] | ValueError] = []
    for record, group in zip(records, groups, strict=True):
        answers = [next(tokenized) for _ in group]
        try:
            results.append([_pair(record, answers) if isinstance(record, PreferencePair) else _labelled(record, *answers)])
        except ValueError as error:
            results.append(error)
    return results


def _pair(record: PreferencePair, answers: Sequence[list[Example] | ValueError]) -> Example:
    """Return the example of a pair. Raises ValueError if an answer cannot be tokenized, is empty, or equals the other one."""
    segments = []
    for name, messages, examples in zip(("chosen", "rejected"), (record.chosen, record.rejected), answers, strict=True):
        _check_answer(name, messages)
        if isinstance(examples, Problem):
            raise Problem(examples.rule, f"{name}: {examples.message}", examples.remedy) from examples
        if isinstance(examples, ValueError):
            raise ValueError(f"{name}: {examples}") from examples
        segments.append(examples)
    if [example.tokens for example in segments[0]] == [example.tokens for example in segments[1]]:
        raise Problem("pair", "chosen and rejected are equal, so the pair prefers nothing", "drop the record")
    num_shared = _shared_positions([segment for answer in segments for segment in answer])
    return _joined(segments, (record.margin, float(num_shared)))


def _shared_positions(segments: Sequence[Example]) -> int:
    """Return how many first positions of all segments have the same input and the same target, which is not trained on."""
    shortest = min(len(segment.tokens) for segment in segments)
    ids = np.array([segment.tokens[:shortest] for segment in segments])
    masks = np.array([_mask_of(segment)[:shortest] for segment in segments])
    is_shared = (ids == ids[0]).all(axis=0) & ~masks.any(axis=0)
    num_tokens = shortest if is_shared.all() else int(np.argmin(is_shared))
    # The last shared token is a target of the shared positions, and the first input of each segment's own ones.
    return max(num_tokens - 1, 0)


def _mask_of(segment: Example) -> list[bool]:
    """Return the loss mask, which every part of a conversation has."""
    assert segment.loss_mask is not None
    return segment.loss_mask


def _labelled(record: LabelledAnswer, examples: list[Example] | ValueError) -> Example:
    """Return the example of a labelled answer. Raises ValueError if it cannot be tokenized."""
    _check_answer("the answer", judged_messages(record))
    if isinstance(examples, ValueError):
        raise examples
    first = examples[0]
    assert first.loss_mask is not None  # a conversation has a mask
    num_prompt = first.loss_mask.index(True)
    prompt = np.asarray(first.tokens[:num_prompt], np.int64).tobytes()
    # Six bytes, which a float64 holds exactly.
    prompt_hash = int.from_bytes(hashlib.sha256(prompt).digest()[:6])
    return _joined([examples], (float(record.good), float(prompt_hash), float(num_prompt), float(len(first.tokens))))


def _check_answer(name: str, messages: Sequence[Message]) -> None:
    """Raise Problem if an answer has no message, or none that says or calls anything."""
    if not messages:
        raise Problem("pair", f"{name} has no message after the prompt", "write the answer")
    for message in messages:
        role = message.get("role")
        if role not in ROLES:
            stated = "no role" if role is None else f"the unknown role {brief(role)}"
            raise Problem("roles", f"{name} has a message with {stated}", f"write one of {', '.join(ROLES)}")
        content = message.get("content", "")
        if not isinstance(content, str | list):
            raise Problem("type", f"{name} has a message whose content is {brief(content)}", "write a text or a list of parts")
    for message in messages:
        texts = (*texts_of(message), *reasoning_of(message))
        if message["role"] == "assistant" and (message.get("tool_calls") or any(text.strip() for text in texts)):
            return
    raise Problem("empty-assistant", f"{name} is empty, so there is nothing to prefer or to avoid", "write it, or drop the record")


def _joined(answers: Sequence[list[Example]], values: tuple[float, ...]) -> Example:
    """Return one example with the segments of all answers."""
    tokens: list[int] = []
    loss_mask: list[bool] = []
    numbers: list[int] = []
    for number, segments in enumerate(answers, start=1):
        for segment in segments:
            tokens += segment.tokens
            loss_mask += _mask_of(segment)
            numbers += [number + SEGMENT_START] + [number] * (len(segment.tokens) - 1)
    return Example(tokens, loss_mask, answers=numbers, values=values)
