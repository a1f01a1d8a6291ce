"""What is learned, written as our objectives."""

from __future__ import annotations

import pytest

from moe_train.config.conversion.draft import Draft
from moe_train.config.conversion.objectives import LOSSES, Pairs, objective_name, put_marks, put_pairs
from moe_train.config.preferences import Preference, UnpairedPreference


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_every_loss_is_written_as_a_valid_objective(loss: str, smoothing: float) -> None:
    draft = Draft({})
    put_pairs(draft, "loss_type", Pairs(loss, 0.3, smoothing, 0.5, 0.7))
    objective = Preference.model_validate(draft.tree["objective"], strict=False)
    assert objective.beta == 0.3 and objective_name(draft) == "preference"
    assert objective.loss == ("sigmoid" if loss == "robust" and not smoothing else loss)
    assert (objective.label_smoothing == smoothing) != bool(draft.remarks)


def test_marks_have_weights_of_one() -> None:
    draft = Draft({})
    assert objective_name(draft) == "next_token"
    put_marks(draft, 0.1, 1.0, 3.0)
    assert draft.tree["objective"] == {"name": "unpaired_preference", "loss": "kto", "beta": 0.1, "undesirable_weight": 3.0}
    assert UnpairedPreference.model_validate(draft.tree["objective"], strict=False).undesirable_weight == 3
