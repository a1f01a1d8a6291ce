"""Parts of a content: texts stay separate parts, reasoning stands before the text, pictures are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer

from moe_train import config
from moe_train.data.records.normal_form import joined_texts
from tests.data.records.reading import ANSWER, CALL, USER, conversation, problem, reading

THOUGHT = {"type": "thinking", "thinking": "Two and two."}
SAID = {"type": "text", "text": "4"}
THINKING = {"role": "assistant", "content": [THOUGHT, SAID]}


@given(st.lists(st.text(max_size=5), min_size=1, max_size=4), st.sampled_from(["system", "user", "assistant", "tool"]))
def test_texts_are_joined_as_mistral_common_joins_them(texts: list[str], role: str) -> None:
    parts = [{"type": "text", "text": text} for text in texts]
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage, "tool": ToolMessage}
    joined = InstructRequestNormalizer.normalizer()._aggregate_content_chunks([kinds[role](content=parts)])
    (message,) = conversation({"messages": [{"role": role, "content": parts}]}).messages
    assert joined_texts(message) == joined
    assert isinstance(message["content"], str) == (sum(map(bool, texts)) < 2)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "4"}, {"text": "4"}, "4", {"type": "output_text", "text": "4"}, {"type": "text", "value": "4"},
        {"type": "text", "text": "4", "train": None},
    ],
)  # fmt: skip
def test_spellings_of_text(part: object) -> None:
    assert conversation({"messages": [USER, {"role": "assistant", "content": [part]}]}).messages[1]["content"] == "4"


@pytest.mark.parametrize(
    "message",
    [
        THINKING,
        {"role": "assistant", "content": [THOUGHT | {"closed": True}, SAID]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Two and two."}]}, SAID]},
        {"role": "assistant", "content": [{"type": "reasoning", "value": "Two and two."}, SAID]},
        {"role": "assistant", "content": "4", "reasoning_content": "Two and two."},
        {"role": "assistant", "content": [SAID], "reasoning": "Two and two."},
        {"role": "assistant", "content": "4", "thinking": "Two and two.", "reasoning": "Two and two."},
        {"role": "assistant", "content": "4", "thinking": [{"type": "text", "text": "Two and two."}]},
        {"role": "assistant", "content": [THOUGHT, SAID], "reasoning_content": "Two and two."},
        {"from": "gpt", "value": "4", "reasoning_content": "Two and two."},
    ],
)
def test_spellings_of_reasoning(message: dict[str, Any]) -> None:
    assert conversation({"messages": [USER, message]}).messages == [USER, THINKING]


def test_reasoning_before_a_call_and_reasoning_that_is_cut_off() -> None:
    calling = {"role": "assistant", "content": None, "reasoning": "So.", "tool_calls": [CALL]}
    thought = {"type": "thinking", "thinking": "So."}
    assert conversation({"messages": [USER, calling]}).messages[1]["content"] == [thought]
    cut = {"role": "assistant", "content": [thought | {"closed": False}]}
    assert conversation({"messages": [USER, cut]}).messages[1] == cut
    assert conversation({"messages": [USER, ANSWER | {"reasoning": ""}]}).messages == [USER, ANSWER]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (ANSWER | {"reasoning": "a", "thinking": "b"}, "which differ"),
        (ANSWER | {"reasoning": {"effort": "high"}}, "should be text"),
        ({"role": "assistant", "content": [THOUGHT, SAID], "reasoning": "Other."}, "in a field and in a part"),
        (USER | {"reasoning": "a"}, "is user, and has reasoning"),
        (USER | {"content": [THOUGHT]}, "the message is user"),
        (ANSWER | {"content": [{"type": "redacted_thinking", "data": "x"}]}, "encrypted"),
        (ANSWER | {"content": [THOUGHT | {"closed": "no"}]}, "has closed"),
        (USER | {"content": [{"type": "input_audio", "input_audio": {}}]}, "should be sound, not {}"),
        (USER | {"content": [{"type": "video", "video": "a"}]}, "video and documents are not read"),
        (USER | {"content": [{"type": "refusal", "refusal": "No."}]}, "which is not read"),
        (USER | {"content": [{"type": "text"}]}, "should have one text"),
        (USER | {"content": [{"type": "text", "text": 3}]}, "should be text"),
        (USER | {"content": [3]}, "should be an object"),
        (USER | {"content": [{"type": "text", "text": "a", "label": 1}]}, "has the key 'label'"),
    ],
)
def test_what_is_not_read_is_a_problem(message: dict[str, Any], said: str) -> None:
    refused = problem({"messages": [message]})
    assert said in refused.message


@pytest.mark.parametrize(
    ("message", "ignored"),
    [
        (THINKING, "content.thinking"),
        (THINKING, "thinking"),
        (ANSWER | {"content": "4", "reasoning_content": "So."}, "messages.reasoning_content"),
        ({"from": "gpt", "value": "4", "reasoning": "So."}, "reasoning"),
    ],
)
def test_reasoning_is_left_out_by_name(message: dict[str, Any], ignored: str) -> None:
    record = config.ChatRecord(name="chat", ignore=(ignored,))
    normal, unread = reading({"messages": [USER, message]}, record)
    assert normal.messages == [USER, {"role": "assistant", "content": "4"}] and len(unread) == 1


def test_empty_reasoning_is_kept_where_it_is_a_part() -> None:
    """A part is there because someone wrote it; an empty field may only be what a table has for a missing value."""
    empty = {"role": "assistant", "content": [THOUGHT | {"thinking": ""}, SAID]}
    assert conversation({"messages": [USER, empty]}).messages[1] == empty
