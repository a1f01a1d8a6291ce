"""Ids of calls are found in a rendering, and not trained on."""

from __future__ import annotations

import pytest

from moe_train.data.chat import conversation_to_tokens
from moe_train.data.chat.call_ids import differing, with_other_ids
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.chat.chats import CALLS, QUESTION, TOOL


def test_an_id_is_not_learnt(tokenizer: HuggingFace) -> None:
    calls = [{"id": name, "type": "function", "function": {"name": "f", "arguments": '{"q": "zq7"}'}} for name in ("zq7", "x")]
    conversation = Conversation([QUESTION, {"role": "assistant", "tool_calls": calls}], [TOOL])
    (example,) = conversation_to_tokens.examples(conversation, CALLS, tokenizer)
    trained_on = tokenizer.decode([t for t, m in zip(example.tokens, example.loss_mask or (), strict=True) if m], keep_special=True)
    assert trained_on == 'f{"q": "zq7"} id f{"q": "zq7"} id </s>'


def test_ids_are_replaced_in_calls_and_results() -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "tool_calls": [call | {"id": "az9Z-0"}, call]}
    assert with_other_ids(message)["tool_calls"] == [call | {"id": "ba0A-1"}, call]
    assert with_other_ids({"role": "tool", "tool_call_id": "a1"}) == {"role": "tool", "tool_call_id": "b2"}
    assert with_other_ids(QUESTION) == QUESTION


def test_what_changes_is_an_id() -> None:
    assert differing("f id ab, g id c", "f id bc, g id d") == [(5, 7), (14, 15)]
    with pytest.raises(Problem, match="writes calls differently for different ids"):
        differing("f id ab", "f id b")
