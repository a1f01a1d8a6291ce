"""Keys that change the meaning of a record are known by their names in any spelling, and by words in their names."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train.data.records.meaning import CALL, MESSAGE, RECORD, TOOL, lost_meaning
from tests.data.records.reading import ANSWER, CALLING, FUNCTION, RESULT, USER, conversation, problem, reading
from tests.data.records.reading import TOOL as A_TOOL


@pytest.mark.parametrize(
    "key",
    [
        *("trained", "no_loss", "do_train", "trainOnTurn", "role-loss", "lossMultiplier", "training_details", "isMasked"),
        *("image_path", "imageURL", "audio-file", "video2", "chat_history", "conversationHistory", "chain_of_thought", "CoT"),
        *("thoughts", "enable_thinking", "system_message", "SystemPrompt", "LABEL", "kto-tag"),
        *("system_instructions", "sys_prompt", "tool_list", "function_schemas", "is_correct", "accepted"),
        *("rejected_completion", "is_desirable", "answer-chosen", "instructions", "tool_use", "assistant_masks"),
    ],
)
def test_words_and_spellings(key: str) -> None:
    assert lost_meaning(RECORD, key) and lost_meaning(MESSAGE, key)
    assert problem({"messages": [USER, ANSWER | {key: "a"}]}).rule == "unread-key"


@pytest.mark.parametrize(
    "key", ["id", "lossless_id", "trainer", "imagery", "tool_choice", "video_id", "numImages", "Übung", "", "score_rejected"]
)
def test_other_words(key: str) -> None:
    assert lost_meaning(RECORD, key) is None and lost_meaning(MESSAGE, key) is None


@pytest.mark.parametrize("key", ["choices", "options", "choice0", "option_a", "answer_choices", "A", "D"])
def test_choices_belong_to_a_question(key: str) -> None:
    assert problem({"question": "Which?", "answer": "2", key: ["a", "b"]}).rule == "unread-key"
    assert lost_meaning(TOOL, key) is None


@pytest.mark.parametrize("key", ["skip", "supervise", "target", "channel", "evidence", "partial", "attachments"])
def test_what_a_message_is_for(key: str) -> None:
    assert lost_meaning(MESSAGE, key)
    assert lost_meaning(CALL, key) is None


@pytest.mark.parametrize("key", ["text", "parts", "Content"])
def test_more_text_of_a_message(key: str) -> None:
    assert "may be text of the message" in problem({"messages": [USER, ANSWER | {key: "More."}]}).message


@pytest.mark.parametrize("key", ["kwargs", "arguments", "parameters", "result", "response", "name"])
def test_more_of_a_call(key: str) -> None:
    (call,) = CALLING["tool_calls"]
    for written in (call | {key: "a"}, call | {"function": call["function"] | {key: "a"}}):
        if written.get("function", {}).get(key) == "a" and key in ("arguments", "name"):
            continue  # it is the call's own
        messages = [USER, CALLING | {"tool_calls": [written]}, RESULT, ANSWER]
        assert problem({"messages": messages}).rule in ("unread-key", "arguments")
    assert lost_meaning(CALL, "index") is None


def test_what_an_object_repeats_of_the_function_in_it_is_not_missed() -> None:
    (call,) = CALLING["tool_calls"]
    messages = [USER, CALLING | {"tool_calls": [call | {"name": "get_tide"}]}, RESULT, ANSWER]
    assert conversation({"messages": messages, "tools": [A_TOOL | {"name": "get_tide"}]}).tools == [A_TOOL]


@pytest.mark.parametrize("tool", [A_TOOL | {"parameters": {"a": 1}}, A_TOOL | {"name": "b"}, FUNCTION | {"required": ["port"]}])
def test_more_of_a_tool(tool: dict[str, Any]) -> None:
    fields = {"messages": [USER, ANSWER], "tools": [tool]}
    refused = problem(fields)
    name = refused.remedy.partition("--ignore ")[2].partition(" ")[0]
    assert refused.rule == "unread-key" and reading(fields, ignore=(name,)).unread == (name,)
