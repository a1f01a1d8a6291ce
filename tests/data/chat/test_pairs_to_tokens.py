"""Pairs and labelled answers as tokens: prompts as in supervised training, loss on the answers alone."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train.data.chat.example import SEGMENT_START, Example
from moe_train.data.chat.pairs_to_tokens import pair_examples_batch
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.chat.chats import render
from tests.data.records.reading import reading

Q = {"role": "user", "content": "2 + 3?"}
A = {"role": "assistant", "content": "It is 5."}
B = {"role": "assistant", "content": "Six."}


def examples(tokenizer: HuggingFace, *records: dict[str, Any]) -> list[Any]:
    return pair_examples_batch([reading(fields).record for fields in records], tokenizer.chat_template, tokenizer)


def test_a_pair_is_its_two_conversations_one_after_the_other(tokenizer: HuggingFace) -> None:
    [[pair]] = examples(tokenizer, {"prompt": [Q, B, Q], "chosen": [A], "rejected": [B]})
    chosen, rejected = (render([Q, B | {"weight": 0}, Q, answer], tokenizer.chat_template, tokenizer) for answer in (A, B))
    assert pair.tokens == [*chosen.tokens, *rejected.tokens] and pair.loss_mask == [*chosen.loss_mask, *rejected.loss_mask]
    numbers = [1 + SEGMENT_START, *[1] * (len(chosen.tokens) - 1), 2 + SEGMENT_START, *[2] * (len(rejected.tokens) - 1)]
    assert pair.answers == numbers and pair.num_positions == len(pair.tokens) - 2
    # One BOS and one end token for each answer, and no loss on the earlier turn.
    assert pair.tokens.count(tokenizer.bos_id) == 2 and sum(pair.loss_mask) == sum(chosen.loss_mask) + sum(rejected.loss_mask)


def test_answers_share_the_tokens_before_the_first_that_differs_or_is_trained_on(tokenizer: HuggingFace) -> None:
    longer = {"role": "assistant", "content": "It is 5, I think."}
    [[same_beginning]], [[other_prompts]], [[short]] = (
        examples(tokenizer, record)
        for record in (
            {"prompt": [Q, B, Q], "chosen": [A], "rejected": [longer]},
            {"chosen": [Q, A, Q, A], "rejected": [Q, B, Q, A]},
            {"prompt": "", "chosen": "a", "rejected": "b"},
        )
    )
    first = same_beginning.loss_mask.index(True)
    # All of the prompt but its last token, whose targets are the answers' first ones.
    assert same_beginning.values == (0.0, first - 1)
    second = other_prompts.answers.index(2 + SEGMENT_START)
    equal = [a == b for a, b in zip(other_prompts.tokens, other_prompts.tokens[second:], strict=False)]
    assert other_prompts.values[1] == min(equal.index(False), other_prompts.loss_mask.index(True)) - 1
    assert short.values[1] == short.loss_mask.index(True) - 1


def test_a_labelled_answer_states_its_label_and_its_prompt(tokenizer: HuggingFace) -> None:
    made = examples(
        tokenizer,
        {"prompt": "2 + 3?", "completion": "It is 5.", "label": True},
        {"prompt": "2 + 3?", "completion": "Six.", "label": False},
        {"prompt": "1 + 1?", "completion": "2", "label": True},
    )
    (good, bad, another) = (example for [example] in made)
    plain = render([Q, A], tokenizer.chat_template, tokenizer)
    assert (good.tokens, good.loss_mask) == (plain.tokens, plain.loss_mask)
    label, prompt_hash, prompt_tokens, segment_tokens = good.values
    assert (label, prompt_tokens, segment_tokens) == (1.0, plain.loss_mask.index(True), len(plain.tokens))
    assert bad.values[:3] == (0.0, prompt_hash, prompt_tokens) and another.values[1] != prompt_hash


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are equal"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected is empty"),
        ({"prompt": "a", "completion": "", "label": False}, "the answer is empty"),
        ({"prompt": [Q], "chosen": [A, Q], "rejected": [B]}, "chosen: the last message is user"),
        ({"messages": [Q, A, Q], "label": True}, "the answer has no message after the prompt"),
        ({"prompt": [Q], "chosen": [{"content": "a"}], "rejected": [B]}, "chosen has a message with no role; write one of system"),
        (
            {"prompt": [Q], "chosen": [A], "rejected": [{"role": "robot", "content": "a"}]},
            "rejected has a message with the unknown role",
        ),
        ({"prompt": [Q], "chosen": [A | {"content": 3}], "rejected": [B]}, "chosen has a message whose content is 3; write a text"),
        ({"prompt": [Q], "chosen": [A | {"weight": 0}], "rejected": [B]}, "chosen: no token would bear loss"),
    ],
)
def test_what_is_wrong_with_one_record_is_said_of_it_alone(tokenizer: HuggingFace, fields: Any, message: str) -> None:
    error, [usable] = examples(tokenizer, fields, {"prompt": "a", "chosen": "b", "rejected": "c"})
    assert isinstance(error, ValueError) and message in str(error) and "\n" not in str(error)
    assert isinstance(usable, Example)
