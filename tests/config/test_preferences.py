"""Settings of the preference objectives that would have no effect are errors."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train import config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing has no effect with loss sigmoid; set loss to robust"),
        ({"loss": "robust"}, "robust without label_smoothing is sigmoid"),
        ({"loss": "ipo", "length_normalized": True}, "length_normalized has no effect with loss ipo"),
        ({"margin": 0.5}, "margin has no effect with loss sigmoid"),
        ({"loss": "orpo", "sft_weight": 0.1}, "sft_weight has no effect with loss orpo"),
        ({"loss": "robust", "label_smoothing": 0.5}, "less than 0.5"),
        ({"beta": 0.0}, "greater than 0"),
    ],
)
def test_a_setting_without_effect_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.Preference.model_validate({"name": "preference", **settings})


def test_only_simpo_and_orpo_have_no_reference() -> None:
    without = {loss for loss in ("sigmoid", "ipo", "hinge", "apo_zero", "apo_down", "simpo", "orpo")}
    assert {loss for loss in without if not config.Preference(name="preference", loss=loss).has_reference} == {"simpo", "orpo"}  # type: ignore[arg-type]
