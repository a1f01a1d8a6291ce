"""Graders of suites: what their sections may state."""

from __future__ import annotations

import pytest

from moe_train.config import ChoiceGrader, JudgeGrader, NumberGrader


def test_settings_without_effect() -> None:
    with pytest.raises(ValueError, match="tolerance has no effect with latex"):
        NumberGrader(name="number", latex=True, tolerance=0.1)
    with pytest.raises(ValueError, match="normalization has no effect on letters"):
        ChoiceGrader(name="choice", compare="letters", normalization="characters")


def test_a_judge_that_would_not_see_the_answer() -> None:
    assert "{answer}" in JudgeGrader(name="judge", model="m").instructions
    with pytest.raises(ValueError, match=r"have no \{answer\}"):
        JudgeGrader(name="judge", model="m", instructions="Is {question} hard?")
    with pytest.raises(ValueError, match="two verdicts differ in upper and lower case alone"):
        JudgeGrader(name="judge", model="m", verdicts={"Yes": 1, "yes": 0})
