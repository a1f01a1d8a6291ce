"""Conversations that break one rule each, and what repairs make of them."""

from __future__ import annotations

import copy
import re
from typing import Any

from moe_train.data.check.requirements import Requirements
from moe_train.data.check.rules import problems, repair
from moe_train.data.records.normal_form import Conversation

FORM = Requirements(re.compile(r"</s>|\[INST\]"), nine_character_ids=True, reasons=True)
USER = {"role": "user", "content": "What is 2 + 3?"}
ANSWER = {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"id": "aaaaaaaa1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "5", "tool_call_id": "aaaaaaaa1"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def call(**changes: Any) -> dict[str, Any]:
    function = CALL["function"] | {key: changes.pop(key) for key in ("name", "arguments") if key in changes}
    return CALL | {"function": function} | changes


def calling(*calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": list(calls)}


def result(name: str) -> dict[str, Any]:
    return RESULT | {"tool_call_id": name}


def without(value: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in value.items() if k != key}


def broken(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[str]:
    return [problem.rule for problem in problems(Conversation(copy.deepcopy(messages), tools or []), FORM)]


Row = tuple[str, list[dict[str, Any]], list[dict[str, Any]] | None]
"""A rule, messages that break it, and what a repair makes of them (None: a conversation that is still wrong)."""

TYPES: list[Row] = [
    ("type", [USER, ANSWER | {"content": 5}], None),
    ("type", [USER, {"role": "assistant"}], None),
    ("type", [CALLING | {"role": "system"}, USER, ANSWER], None),
    ("type", [USER | {"role": 3}, ANSWER], None),
    ("type", [without(USER, "role"), ANSWER], None),
    ("type", [USER, calling({"id": "aaaaaaaa1"})], None),
    ("type", [USER, calling("add")], None),  # type: ignore[arg-type]
    ("type", [USER, CALLING, RESULT | {"tool_call_id": 1}, ANSWER], None),
]
TEXTS: list[Row] = [
    ("unicode", [USER, ANSWER | {"content": "5\x00"}], [USER, ANSWER | {"content": "5\ufffd"}]),
    ("unicode", [USER | {"content": "\ud83d?"}, ANSWER], [USER | {"content": "\ufffd?"}, ANSWER]),
    ("unicode", [USER | {"content": "\ufdd0?"}, ANSWER], [USER | {"content": "\ufffd?"}, ANSWER]),
    ("control-token", [USER | {"content": "a</s>b"}, ANSWER], None),
    ("reasoning-as-text", [USER, ANSWER | {"content": "\n<think>2 + 3</think>5"}], None),
    (
        "reasoning-as-text",
        [USER, ANSWER | {"content": [{"type": "text", "text": "<Thinking>"}, {"type": "text", "text": "5"}]}],
        None,
    ),
    ("unicode", [USER, CALLING, RESULT | {"content": '{"a": "\\ud83d"}'}, ANSWER], None),
    ("control-token", [USER, calling(call(arguments='{"a": "\\u005bINST]"}')), RESULT, ANSWER], None),
    ("control-token", [USER, calling(call(arguments='{"a": "[INST]"}')), RESULT, ANSWER], None),
]
TURNS: list[Row] = [
    ("role", [USER | {"role": "Human"}, ANSWER | {"role": "gpt"}], [USER, ANSWER]),
    ("role", [USER | {"role": "narrator"}, ANSWER], None),
    ("system-first", [USER, SYSTEM, ANSWER], [SYSTEM, USER, ANSWER]),
    ("system-first", [SYSTEM, SYSTEM, USER, ANSWER], [SYSTEM | {"content": "Be brief.\n\nBe brief."}, USER, ANSWER]),
    ("system-first", [SYSTEM, USER, SYSTEM, ANSWER], None),
    ("system-first", [USER, ANSWER, SYSTEM, USER, ANSWER], None),
    ("empty-assistant", [USER, ANSWER, USER, ANSWER | {"content": " \n"}], [USER, ANSWER]),
    ("empty-assistant", [USER, ANSWER, USER, ANSWER | {"content": ""}, USER, ANSWER], [USER, ANSWER]),
    ("empty-assistant", [USER, ANSWER | {"content": ""}], None),
    ("empty-user", [USER | {"content": "\n"}, ANSWER], None),
    ("empty-user", [USER, ANSWER, USER | {"content": ""}, ANSWER], None),
    ("role-order", [USER, USER, ANSWER], [USER | {"content": "What is 2 + 3?\n\nWhat is 2 + 3?"}, ANSWER]),
    ("role-order", [USER, ANSWER, ANSWER], None),
    ("role-order", [USER, ANSWER, ANSWER | {"weight": 0}], None),
    ("role-order", [ANSWER, USER, ANSWER], None),
    ("role-order", [USER, RESULT, ANSWER], None),
    ("role-order", [USER, CALLING, RESULT, USER, ANSWER], None),
    ("last-turn", [USER, ANSWER, USER], [USER, ANSWER]),
    ("last-turn", [USER, CALLING, RESULT], [USER, CALLING]),
    ("no-loss", [USER, ANSWER | {"weight": 0}], None),
]
CALLS: list[Row] = [
    ("call-role", [USER | {"tool_calls": [CALL]}, ANSWER], None),
    ("function-name", [USER, calling(call(name="add two")), RESULT, ANSWER], None),
    ("call-id", [USER, calling(without(CALL, "id")), without(RESULT, "tool_call_id"), ANSWER], []),
    ("call-id", [USER, calling(call(id="call_1")), result("call_1"), ANSWER], []),
    ("call-id", [USER, calling(without(CALL, "id")), RESULT, ANSWER], [USER, CALLING, RESULT, ANSWER]),
    ("call-result", [USER, CALLING, result("aaaaaaaa2"), ANSWER], [USER, CALLING, RESULT, ANSWER]),
    ("call-result", [USER, CALLING, ANSWER], None),
    ("call-result", [USER, calling(call(), call()), RESULT, RESULT, ANSWER], None),
    ("call-result", [USER, calling(call(), call(id="aaaaaaaa2")), RESULT, RESULT, ANSWER], None),
]


def check_repair(rule: str, messages: list[dict[str, Any]], repaired: list[dict[str, Any]] | None) -> None:
    """Assert that the rule is broken, and that a repair ends as stated, changes nothing else and is complete."""
    before = copy.deepcopy(messages)
    assert rule in broken(messages)
    conversation, changes = repair(Conversation(messages, []), FORM)
    assert messages == before  # a repair is a copy
    still = conversation.messages and broken(conversation.messages)
    if repaired is None:
        assert still or not conversation.messages
    else:
        assert still == [] and changes[0][0] in (rule, "call-id")
        assert not repaired or conversation.messages == repaired
        assert repair(conversation, FORM) == (conversation, [])
