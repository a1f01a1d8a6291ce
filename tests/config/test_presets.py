"""Presets have the published sizes, and single keys of them can be replaced."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from moe_train import config
from moe_train.config.presets import PRESETS, PresetName
from moe_train.config.schema import json_schema
from tests.config.tiny import config_with, refusal
from tests.weights.names.models import PUBLISHED

OF_PUBLISHED = {
    "mistral-7b": "Mistral 7B v0.3",
    "mistral-nemo": "Mistral Nemo",
    "ministral-8b": "Ministral 8B",
    "ministral3-3b": "Ministral 3 3B",
    "mixtral-8x7b": "Mixtral 8x7B",
    "mixtral-8x22b": "Mixtral 8x22B",
    "mistral-small-4": "Mistral Small 4",
    "deepseek-v3": "DeepSeek-V3",
}


def model_with(**keys: Any) -> config.Model:
    model = config_with(model=keys, loss={"load_balance_loss_coef": 0, "router_z_loss_coef": 0}).model
    assert model is not None
    return model


def test_the_names_are_those_of_the_table() -> None:
    assert set(get_args(PresetName)) == set(PRESETS)


@pytest.mark.parametrize("name", OF_PUBLISHED)
def test_a_preset_has_the_published_sizes(name: str) -> None:
    """The sizes that decide the number of parameters are those of the models whose files were counted."""
    stated = config.Model.model_validate_json(f'{{"preset": "{name}"}}')
    published = PUBLISHED[OF_PUBLISHED[name]][0]
    for key in ("family", "vocab_size", "model_dim", "num_layers", "ffn", "tie_embeddings"):
        assert getattr(stated, key) == getattr(published, key), key
    irrelevant = {"query_scaling", "scale_correction"}
    assert stated.attention.model_dump(exclude=irrelevant) == published.attention.model_dump(exclude=irrelevant)


def test_keys_that_are_stated_win() -> None:
    model = model_with(preset="mixtral-8x7b", num_layers=2, ffn={"num_experts": 4})
    assert (model.num_layers, model.model_dim) == (2, 4096)
    assert isinstance(model.ffn, config.MoeFfn) and (model.ffn.num_experts, model.ffn.ffn_dim) == (4, 14336)
    assert "preset" not in model.model_dump() and model.preset is None, "a dump states the sizes themselves"


def test_another_kind_replaces_the_whole_section() -> None:
    model = config.Model.model_validate_json(
        '{"preset": "mixtral-8x7b", "family": "mistral", "ffn": {"name": "dense", "ffn_dim": 8}}'
    )
    assert model.ffn == config.DenseFfn(name="dense", ffn_dim=8)


def test_an_unknown_preset_is_refused() -> None:
    assert "preset mixtral is not known; one of mistral-7b" in refusal(model={"preset": "mixtral"})


def test_the_schema_asks_for_sizes_only_without_a_preset() -> None:
    model = json_schema(config.Config)["$defs"]["Model"]
    assert "required" not in model and "vocab_size" in model["else"]["required"]
    assert model["if"]["required"] == ["preset"]
