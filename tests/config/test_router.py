"""The kinds of routers and their groups of experts."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from moe_train import config


def test_a_softmax_router_states_its_scale_only_if_it_has_one() -> None:
    assert "scale" not in config.SoftmaxRouter(name="softmax").model_dump()
    assert config.SoftmaxRouter(name="softmax", scale=2.5).model_dump()["scale"] == 2.5


@pytest.mark.parametrize(("groups", "chosen", "message"), [(1, 2, "exceeds num_groups"), (2, 2, "limits nothing")])
def test_groups_that_limit_nothing_are_refused(groups: int, chosen: int, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config.SigmoidRouter(name="sigmoid", num_groups=groups, groups_per_token=chosen)
