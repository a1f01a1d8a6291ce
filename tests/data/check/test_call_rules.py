"""Rules of tool calls: each is broken by a conversation made for it, and repaired where there is one right answer."""

from __future__ import annotations

import re
from typing import Any

import pytest

from moe_train.data.check.requirements import Requirements
from moe_train.data.check.rules import problems, repair
from moe_train.data.records.normal_form import Conversation
from tests.data.check.broken_records import ANSWER, CALLS, FORM, USER, call, calling, check_repair, result


@pytest.mark.parametrize(("rule", "messages", "repaired"), CALLS)
def test_calls_that_break_a_rule(rule: str, messages: list[dict[str, Any]], repaired: list[dict[str, Any]] | None) -> None:
    check_repair(rule, messages, repaired)


def test_ids_are_renamed_the_same_way_on_both_sides() -> None:
    messages = [USER, calling(call(id="call_1"), call(id="call_2")), result("call_2"), result("call_1"), ANSWER]
    conversation, changes = repair(Conversation(messages, []), FORM)
    assert isinstance(conversation, Conversation)
    repaired = conversation.messages
    one, two = (entry["id"] for entry in repaired[1]["tool_calls"])
    assert [repaired[2]["tool_call_id"], repaired[3]["tool_call_id"]] == [two, one] and one != two
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", name) for name in (one, two))
    assert [rule for rule, _ in changes] == ["call-id", "call-id"]
    assert repair(Conversation(messages, []), FORM)[0].messages == repaired
    free = Requirements(FORM.control, nine_character_ids=False)
    assert not list(problems(Conversation(messages, []), free))
