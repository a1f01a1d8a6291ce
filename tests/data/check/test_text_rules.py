"""Rules of text: unusable characters are replaced, control tokens that somebody typed are only reported."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train.data.check import text_rules
from moe_train.data.records.normal_form import Conversation
from tests.data.check.broken_records import ANSWER, FORM, TEXTS, USER, check_repair


@pytest.mark.parametrize(("rule", "messages", "repaired"), TEXTS)
def test_texts_that_break_a_rule(rule: str, messages: list[dict[str, Any]], repaired: list[dict[str, Any]] | None) -> None:
    check_repair(rule, messages, repaired)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("plain\n東京", None),
        ("a\0b", "has NUL (U+0000) at character 1"),
        ("\udc00", "has half a surrogate pair (U+DC00) at character 0"),
        ("ab\ufdd3", "has a noncharacter (U+FDD3) at character 2"),
    ],
)
def test_the_first_unusable_character_is_named(text: str, fault: str | None) -> None:
    assert text_rules.unusable_character(text) == fault


def test_a_control_token_is_found_in_every_text_of_a_conversation() -> None:
    tool = {"type": "function", "function": {"name": "add", "description": "</s>"}}
    conversation = Conversation([USER | {"content": "x [INST]"}, ANSWER], [tool])
    assert list(text_rules.typed_control_tokens(conversation, FORM)) == [
        "message 0 (user) has the control token [INST] typed as text at character 2",
        "tool 0 has the control token </s> typed as text at character 65",
    ]
