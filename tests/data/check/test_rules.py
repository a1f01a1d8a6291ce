"""Rules: each is broken by a record made for it and by nothing else, and repairs lead to what training takes."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train import config
from moe_train.data.chat.conversation_to_tokens import examples
from moe_train.data.check import rules
from moe_train.data.check.form import Form, form_of
from moe_train.data.check.rules import problems, repair
from moe_train.data.records.conversation import Conversation, normalise
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.conversations import conversations

FORM = Form(re.compile(r"</s>|\[INST\]"), nine_character_ids=True)
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


GOOD: list[list[dict[str, Any]]] = [
    [USER, ANSWER],
    [SYSTEM, USER, ANSWER, USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1}],
    [USER, CALLING, RESULT, ANSWER, USER, ANSWER],
    [USER, CALLING | {"content": "I add."}, RESULT, CALLING, RESULT, ANSWER],
    [USER, calling(call(), call(id="aaaaaaaa2")), result("aaaaaaaa2"), result("aaaaaaaa1"), ANSWER],
    [USER, calling(without(CALL, "id"))],
]


@pytest.mark.parametrize("messages", GOOD)
def test_what_is_right(messages: list[dict[str, Any]]) -> None:
    assert broken(messages, [TOOL]) == []
    conversation = Conversation(messages, [TOOL])
    assert repair(conversation, FORM) == (conversation, [])


# rule, messages, what a repair makes of them (None: nothing that is right)
BAD: list[tuple[str, list[dict[str, Any]], list[dict[str, Any]] | None]] = [
    ("type", [USER, ANSWER | {"content": 5}], None),
    ("type", [USER, {"role": "assistant"}], None),
    ("type", [CALLING | {"role": "system"}, USER, ANSWER], None),
    ("type", [USER | {"role": 3}, ANSWER], None),
    ("type", [without(USER, "role"), ANSWER], None),
    ("type", [USER, calling({"id": "aaaaaaaa1"})], None),
    ("type", [USER, calling("add")], None),  # type: ignore[arg-type]
    ("type", [USER, CALLING, RESULT | {"tool_call_id": 1}, ANSWER], None),
    ("unicode", [USER, ANSWER | {"content": "5\x00"}], [USER, ANSWER | {"content": "5\ufffd"}]),
    ("unicode", [USER | {"content": "\ud83d?"}, ANSWER], [USER | {"content": "\ufffd?"}, ANSWER]),
    ("unicode", [USER | {"content": "\ufdd0?"}, ANSWER], [USER | {"content": "\ufffd?"}, ANSWER]),
    ("control-token", [USER | {"content": "a</s>b"}, ANSWER], None),
    ("control-token", [USER, calling(call(arguments='{"a": "[INST]"}')), RESULT, ANSWER], None),
    ("role", [USER | {"role": "Human"}, ANSWER | {"role": "gpt"}], [USER, ANSWER]),
    ("role", [USER | {"role": "narrator"}, ANSWER], None),
    ("weight", [USER, ANSWER | {"weight": True}], [USER, ANSWER | {"weight": 1}]),
    ("weight", [USER, ANSWER | {"weight": 1.0}], [USER, ANSWER | {"weight": 1}]),
    ("weight", [USER, ANSWER | {"weight": "1"}], [USER, ANSWER | {"weight": 1}]),
    ("weight", [USER, ANSWER | {"weight": 0.5}], None),
    ("system-first", [USER, SYSTEM, ANSWER], [SYSTEM, USER, ANSWER]),
    ("system-first", [SYSTEM, SYSTEM, USER, ANSWER], [SYSTEM | {"content": "Be brief.\n\nBe brief."}, USER, ANSWER]),
    ("system-first", [SYSTEM, USER, SYSTEM, ANSWER], None),
    ("empty-assistant", [USER, ANSWER, USER, ANSWER | {"content": " \n"}], [USER, ANSWER]),
    ("empty-assistant", [USER, ANSWER, USER, ANSWER | {"content": ""}, USER, ANSWER], [USER, ANSWER]),
    ("empty-assistant", [USER, ANSWER | {"content": ""}], None),
    ("role-order", [USER, USER, ANSWER], [USER | {"content": "What is 2 + 3?\n\nWhat is 2 + 3?"}, ANSWER]),
    ("role-order", [USER, ANSWER, ANSWER], [USER, ANSWER | {"content": "5\n\n5"}]),
    ("role-order", [USER, ANSWER, ANSWER | {"weight": 0}], None),
    ("role-order", [ANSWER, USER, ANSWER], None),
    ("role-order", [USER, RESULT, ANSWER], None),
    ("role-order", [USER, CALLING, RESULT, USER, ANSWER], None),
    ("call-role", [USER | {"tool_calls": [CALL]}, ANSWER], None),
    ("function-name", [USER, calling(call(name="add two")), RESULT, ANSWER], None),
    ("arguments", [USER, calling(call(arguments={"a": 2})), RESULT, ANSWER], [USER, CALLING, RESULT, ANSWER]),
    ("arguments", [USER, calling(call(arguments="a=2")), RESULT, ANSWER], None),
    ("call-id", [USER, calling(without(CALL, "id")), without(RESULT, "tool_call_id"), ANSWER], []),
    ("call-id", [USER, calling(call(id="call_1")), result("call_1"), ANSWER], []),
    ("call-id", [USER, calling(without(CALL, "id")), RESULT, ANSWER], [USER, CALLING, RESULT, ANSWER]),
    ("call-result", [USER, CALLING, result("aaaaaaaa2"), ANSWER], [USER, CALLING, RESULT, ANSWER]),
    ("call-result", [USER, CALLING, ANSWER], None),
    ("call-result", [USER, calling(call(), call()), RESULT, RESULT, ANSWER], None),
    ("call-result", [USER, calling(call(), call(id="aaaaaaaa2")), RESULT, RESULT, ANSWER], None),
    ("last-turn", [USER, ANSWER, USER], [USER, ANSWER]),
    ("last-turn", [USER, CALLING, RESULT], [USER, CALLING]),
    ("no-loss", [USER, ANSWER | {"weight": 0}], None),
]


@pytest.mark.parametrize(("rule", "messages", "repaired"), BAD)
def test_what_is_wrong(rule: str, messages: list[dict[str, Any]], repaired: list[dict[str, Any]] | None) -> None:
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


def test_every_rule_has_a_record_that_breaks_it() -> None:
    assert {rule.name for rule in rules.RULES} <= {rule for rule, _, _ in BAD}
    assert len({rule.name for rule in rules.RULES}) == len(rules.RULES)


def test_a_rule_says_what_it_found_and_what_to_do() -> None:
    [problem] = problems(Conversation([USER, USER, ANSWER], []), FORM)
    assert str(problem) == (
        "message 1 is user after user, where assistant should be; after an optional system message, user and assistant take turns"
    )


def test_ids_are_renamed_the_same_way_on_both_sides() -> None:
    messages = [USER, calling(call(id="call_1"), call(id="call_2")), result("call_2"), result("call_1"), ANSWER]
    (repaired, _), changes = repair(Conversation(messages, []), FORM)
    one, two = (entry["id"] for entry in repaired[1]["tool_calls"])
    assert [repaired[2]["tool_call_id"], repaired[3]["tool_call_id"]] == [two, one] and one != two
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", name) for name in (one, two))
    assert [rule for rule, _ in changes] == ["call-id", "call-id"]
    assert repair(Conversation(messages, []), FORM)[0].messages == repaired
    free = Form(FORM.control, nine_character_ids=False)
    assert not list(problems(Conversation(messages, []), free))


@pytest.mark.parametrize(
    ("text", "rule"),
    [("", "empty-text"), (" \n", "empty-text"), ("a\0b", "unicode"), ("\udc00", "unicode"), ("x [INST] y", "control-token")],
)
def test_texts(text: str, rule: str) -> None:
    assert [problem.rule for problem in problems(text, FORM)] == [rule]
    repaired, changes = repair(text, FORM)
    assert bool(changes) == (rule == "unicode") == (repaired != text)
    assert not changes or not list(problems(repaired, FORM))


PLAIN = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn"], exclude_characters="<[ "), min_size=1, max_size=20).filter(
    str.strip
)


@settings(max_examples=60, deadline=None)
@given(conversations(tools=True, said=PLAIN, answers=PLAIN, results=PLAIN))
def test_no_false_alarms(record: dict[str, Any]) -> None:
    form = Form(re.compile("(?!)"), nine_character_ids=True)
    conversation = normalise(record, config.ChatRecord(name="chat"))
    found = [problem.message for problem in problems(conversation, form)]
    assert not [message for message in found if "U+" not in message]


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "human", "narrator"])},
        optional={
            "content": st.sampled_from(["a", "b", "", " ", "\0"]),
            "weight": st.sampled_from([0, 1, True, 0.5, "0"]),
            "tool_calls": st.lists(
                st.sampled_from(
                    [CALL, call(id="aaaaaaaa2"), without(CALL, "id"), call(id="x"), call(arguments={}), call(arguments="?")]
                ),
                min_size=1,
                max_size=2,
            ),
            "tool_call_id": st.sampled_from(["aaaaaaaa1", "aaaaaaaa2", "x"]),
        },
    ),
    min_size=1,
    max_size=6,
)
V3 = Mistral(Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3")


@settings(max_examples=300, deadline=None)
@given(MESSAGES)
def test_what_is_repaired_can_be_trained_on(messages: list[dict[str, Any]]) -> None:
    conversation = Conversation(messages, [])
    form = form_of(V3, None)
    repaired, changes = repair(conversation, form)
    assert bool(changes) == (json.dumps(repaired) != json.dumps(conversation))  # True equals 1
    if repaired.messages and not list(problems(repaired, form)):
        beside = any("tool_calls" in message and message.get("content") for message in repaired.messages)
        if not beside:  # v3 has no form for words beside a call
            assert examples(repaired, None, V3)
