"""One line when preferred answers become unlikely."""

from __future__ import annotations

import pytest

from moe_train import config
from moe_train.run.chosen_answers import STEPS, ChosenAnswers

KTO = config.UnpairedPreference(name="unpaired_preference")


@pytest.mark.parametrize(
    ("objective", "remedy"),
    [(config.Preference(name="preference"), "objective.sft_weight (0 now"), (KTO, "objective.desirable_weight")],
)
def test_a_fall_is_said_once_with_its_remedy(objective: config.Objective, remedy: str) -> None:
    watch = ChosenAnswers(objective)
    lines = [watch.warning(step, {"rewards/chosen": -0.2}) for step in range(1, 2 * STEPS)]
    assert [step for step, line in enumerate(lines, 1) if line] == [STEPS]
    line = lines[STEPS - 1]
    assert line is not None and "by 2 nats" in line and remedy in line


def test_small_falls_and_losses_without_a_reference_are_left_alone() -> None:
    watch = ChosenAnswers(KTO)
    assert not any(watch.warning(step, {"rewards/chosen": -0.05}) for step in range(1, 3 * STEPS))
    assert ChosenAnswers(config.Preference(name="preference", loss="simpo")).warning(1, {}) is None
    assert ChosenAnswers(config.NextToken(name="next_token")).warning(1, {}) is None
