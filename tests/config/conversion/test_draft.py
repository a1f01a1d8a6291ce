"""A config while it is converted: values are read once, and what nobody reads is named."""

from __future__ import annotations

import pytest

from moe_train import config
from moe_train.config.conversion.draft import EVERY_LINEAR, LAYERS, Draft, local_model, modules
from moe_train.config.presets import PRESETS
from moe_train.run.resolve import _modules


def test_values_are_read_under_any_of_their_names() -> None:
    draft = Draft({"optim": None, "optimizer": "lion", "lr": "1e-4", "steps": 10.0})
    assert draft.take("optim", "optimizer") == "lion"
    assert draft.number("lr") == 1e-4, "YAML 1.1 reads 1e-4 as text"
    assert draft.whole("steps") == 10 and draft.whole("epochs") is None
    with pytest.raises(ValueError, match="rate has to be a number"):
        Draft({"rate": "fast"}).number("rate")
    with pytest.raises(ValueError, match="steps has to be a whole number"):
        Draft({"steps": 1.5}).whole("steps")


def test_what_nobody_reads_is_named_unless_it_says_nothing() -> None:
    draft = Draft({"router_jitter": "high", "lora_r": 8, "tf32": False, "wandb_project": None})
    draft.finish()
    assert draft.remarks == [
        'router_jitter: moe_train has no such setting (value "high")',
        "lora_r: use lora.targets.0.rank (value 8)",
    ]


def test_a_model_of_the_hub_becomes_a_directory() -> None:
    draft = Draft({})
    assert local_model(draft, "mistralai/Mixtral-8x7B-v0.1") == "models/Mixtral-8x7B-v0.1"
    assert "hf download mistralai/Mixtral-8x7B-v0.1 --local-dir models/Mixtral-8x7B-v0.1" in draft.remarks[0]
    assert local_model(draft, "/models/a") == "/models/a" and len(draft.remarks) == 1


def test_modules_are_renamed() -> None:
    draft = Draft({})
    assert modules(draft, "t", ["q_proj", "model.layers.0.block_sparse_moe.experts.0.w1", "lm_head"]) == [
        "attention.q_proj",
        "ffn.gate_proj",
        "head",
    ]
    assert modules(draft, "t", "all-linear") == list(EVERY_LINEAR) and not draft.remarks
    assert modules(draft, "t", "c_attn") == [] and "c_attn is not known" in draft.remarks[0]


def test_our_names_are_names_of_modules() -> None:
    known = set()
    for name in ("mixtral-8x7b", "mistral-small-4"):
        known |= set(_modules(config.Model.model_validate(PRESETS[name], strict=False)))
    assert set(LAYERS.values()) <= known
