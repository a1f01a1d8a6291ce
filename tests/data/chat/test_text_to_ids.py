"""Turns that share a text share an example only if the ids of each are the same without the turns after it."""

from __future__ import annotations

import pytest

from moe_train.data.chat.example import NEW_USER_TURN, REWRITTEN
from moe_train.data.chat.loss_mask import Text, TurnText
from moe_train.data.chat.text_to_ids import encode_texts
from moe_train.data.tokenizers.huggingface import HuggingFace


def two_turns(first: str, second: str, after: str = "", restart: str | None = None) -> Text:
    spans = [(0, len(first)), (len(first), len(first + second))]
    return Text(first + second, spans, [], (TurnText(1, after), TurnText(2, "")), restart)


@pytest.mark.parametrize("after", ["", "\n"])
def test_turns_that_end_in_a_control_token_share_an_example(tokenizer: HuggingFace, after: str) -> None:
    ((example,),) = encode_texts([two_turns("the fox</s>", after + "the dog</s>", after)], tokenizer)
    first = [*tokenizer.encode("the fox"), tokenizer.eos_id]
    assert example.tokens[: len(first)] == first and example.merged is not None
    num_after = len(tokenizer.encode(after)) if after else 0
    assert example.merged.ends == (len(first), len(example.tokens))
    assert example.merged.separate_tokens == len(first) + num_after + len(example.tokens)


def test_turns_whose_ids_depend_on_what_follows_get_an_example_each(tokenizer: HuggingFace) -> None:
    joined = tokenizer.encode("the quick")
    cut = next(i for i in range(1, 9) if tokenizer.encode("the quick"[:i]) != joined[: len(tokenizer.encode("the quick"[:i]))])
    ((first, second),) = encode_texts([two_turns("the quick"[:cut], "the quick"[cut:], restart=NEW_USER_TURN)], tokenizer)
    assert first.tokens == tokenizer.encode("the quick"[:cut]) and second.tokens == joined
    assert [example.merged.restart for example in (first, second) if example.merged] == [NEW_USER_TURN, REWRITTEN]
    assert first.loss_mask is not None and all(first.loss_mask)
    assert second.loss_mask is not None and second.loss_mask[-1] and not all(second.loss_mask)


def test_turns_without_a_control_token_share_an_example_if_their_ids_allow(tokenizer: HuggingFace) -> None:
    text = "the quick the"
    whole = tokenizer.encode(text)
    cut = next(i for i in range(4, len(text)) if tokenizer.encode(text[:i]) == whole[: len(tokenizer.encode(text[:i]))] != whole)
    ((example,),) = encode_texts([two_turns(text[:cut], text[cut:])], tokenizer)
    assert example.tokens == whole and example.merged is not None and len(example.merged.ends) == 2
