"""Reasoning against the effort that a prompt asks for; more in test_template_reasoning.py and test_mistral_settings.py."""

from __future__ import annotations

import pytest

from moe_train.data.chat.settings import check_effort, not_written, reasoning_not_written
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem

THINKS = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": [{"type": "thinking", "thinking": "Add."}, {"type": "text", "text": "4"}]},
]


def test_a_turn_that_reasons_is_a_problem_where_the_prompt_asks_for_none() -> None:
    with pytest.raises(Problem, match="reasoning_effort") as caught:
        check_effort(Conversation(THINKS, []), "none", "reasoning_effort")
    assert caught.value.rule == "effort"
    for effort in ("high", None):
        check_effort(Conversation(THINKS, []), effort, "reasoning_effort")
    not_trained_on = [THINKS[0], THINKS[1] | {"weight": 0}]
    check_effort(Conversation(not_trained_on, []), "none", "reasoning_effort")


def test_problems_name_the_option_that_leaves_a_key_out() -> None:
    assert "--ignore response_format" in not_written("response_format", "v3 has no place for it").remedy
    assert "use v13, or leave the reasoning out" in reasoning_not_written(1, "v3 has no place for it", "use v13").remedy
