"""Defaults and types of the fields of params.json."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from moe_train.weights.mistral.params_fields import LATENT_SIZES, Moe, Params
from moe_train.weights.mistral.params_json import write_model_config
from tests.tiny import MIXTRAL

PARAMS = write_model_config(MIXTRAL)


def test_a_single_latent_size_makes_the_attention_latent() -> None:
    assert not Params.model_validate(PARAMS).has_latents
    assert all(Params.model_validate({**PARAMS, key: 8}).has_latents for key in LATENT_SIZES)


def test_fields_that_change_the_router_have_one_value() -> None:
    Moe(num_experts=4, num_experts_per_tok=2, expert_parallel=8)
    for key, value in (("num_expert_groups", 2), ("route_every_n", 2), ("use_load_balancing_bias", True)):
        with pytest.raises(ValidationError, match=key):
            Moe.model_validate({"num_experts": 4, "num_experts_per_tok": 2, key: value})


def test_the_experts_of_mixtral_are_written_in_two_fields() -> None:
    assert PARAMS["moe"] == {"num_experts": 4, "num_experts_per_tok": 2}
