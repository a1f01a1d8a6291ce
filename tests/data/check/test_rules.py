"""Rules: good records break none, each has a record that breaks it, and repairs lead to what training accepts."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train import config
from moe_train.data.chat.conversation_to_tokens import examples
from moe_train.data.check import rules
from moe_train.data.check.requirements import Requirements, requirements_of
from moe_train.data.check.rules import problems, repair
from moe_train.data.records.conversation import normalise
from moe_train.data.records.normal_form import Conversation
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.check.broken_records import (
    ANSWER,
    CALL,
    CALLING,
    CALLS,
    FORM,
    RESULT,
    SYSTEM,
    TEXTS,
    TOOL,
    TURNS,
    TYPES,
    USER,
    broken,
    call,
    calling,
    check_repair,
    result,
    without,
)
from tests.data.conversations import conversations
from tests.data.hugging_face import V3 as V3_FILE

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


@pytest.mark.parametrize(("rule", "messages", "repaired"), TYPES)
def test_a_value_of_the_wrong_type(rule: str, messages: list[dict[str, Any]], repaired: list[dict[str, Any]] | None) -> None:
    check_repair(rule, messages, repaired)


def test_every_rule_has_a_record_that_breaks_it() -> None:
    assert {rule.name for rule in rules.RULES} <= {rule for rule, _, _ in (*TYPES, *TEXTS, *TURNS, *CALLS)}
    assert len({rule.name for rule in rules.RULES}) == len(rules.RULES)


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
    form = Requirements(re.compile("(?!)"), nine_character_ids=True)
    conversation = normalise(record, config.ChatRecord(name="chat"))
    messages = [problem.message for problem in problems(conversation, form)]
    assert not [message for message in messages if "U+" not in message]


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
V3 = Mistral(V3_FILE)


@settings(max_examples=300, deadline=None)
@given(MESSAGES)
def test_what_is_repaired_can_be_trained_on(messages: list[dict[str, Any]]) -> None:
    conversation = Conversation(messages, [])
    form = requirements_of(V3, None)
    repaired, changes = repair(conversation, form)
    assert bool(changes) == (json.dumps(repaired) != json.dumps(conversation))  # True equals 1
    if repaired.messages and not list(problems(repaired, form)):
        has_text_and_calls = any("tool_calls" in message and message.get("content") for message in repaired.messages)
        if not has_text_and_calls:  # v3 has no form for text next to a call
            assert examples(repaired, None, V3)
