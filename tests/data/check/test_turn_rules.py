"""Rules of turns: each is broken by a conversation made for it, and repaired where there is one right answer."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train.data.check import turn_rules
from moe_train.data.check.rules import problems
from moe_train.data.records.normal_form import Conversation
from tests.data.check.broken_records import ANSWER, FORM, TURNS, USER, check_repair


@pytest.mark.parametrize(("rule", "messages", "repaired"), TURNS)
def test_turns_that_break_a_rule(rule: str, messages: list[dict[str, Any]], repaired: list[dict[str, Any]] | None) -> None:
    check_repair(rule, messages, repaired)


def test_a_rule_says_what_it_found_and_what_to_do() -> None:
    [problem] = problems(Conversation([USER, USER, ANSWER], []), FORM)
    assert str(problem) == (
        "message 1 is user after user, where assistant should be; after an optional system message, user and assistant take turns"
    )


@pytest.mark.parametrize(("role", "expected"), [(" Human", "user"), ("gpt", "assistant"), ("narrator", "narrator"), (3, "3")])
def test_other_names_of_roles(role: object, expected: str) -> None:
    assert turn_rules.normal_role(role) == expected
