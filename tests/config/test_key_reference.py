"""Every key has a description, and can be found by its path, its last name, or another trainer's name."""

from __future__ import annotations

import pytest

from moe_train.config import Config, Suite
from moe_train.config.key_reference import explain, keys, sections
from moe_train.config.section import Section


@pytest.mark.parametrize("kind", [Config, Suite])
def test_every_key_has_a_description_of_its_own(kind: type[Section]) -> None:
    for section in sections(kind):
        assert section.description.endswith("."), f"{section.path} {section.kind}: write the docstring of the section"
        for key in section.keys:
            assert key.description.endswith("."), f"{key.path}: write a docstring below the field"


def test_kinds_that_share_a_key_share_its_entry() -> None:
    (rounding,) = explain("optimizer.rounding", Config)
    assert rounding.kinds == ("adafactor", "adamw", "lion", "muon")
    assert (rounding.type, rounding.default) == ("nearest, stochastic or float32_master", '"nearest"')
    dense, moe = explain("model.ffn.ffn_dim", Config)
    assert (dense.kinds, moe.kinds) == (("dense",), ("moe",)) and dense.default is None


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("rounding", "optimizer.rounding"),
        ("data.train.3.weight", "data.train[].weight"),
        ("data.train[].weight", "data.train[].weight"),
        ("lora.targets.rank", "lora.targets[].rank"),
    ],
)
def test_a_key_may_be_written_in_several_ways(key: str, path: str) -> None:
    assert explain(key, Config)[0].path == path


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("optimizer.roundig", "did you mean optimizer.rounding"),
        ("trian.stepz", "did you mean train.steps"),
        ("microbatchs", "did you mean train.microbatches"),
        ("gradient_accumulation_steps", "use train.microbatches"),
        ("qqqq", "`moe-train explain` without a key lists all of them"),
    ],
)
def test_a_key_that_is_not_there_suggests_one(key: str, message: str) -> None:
    with pytest.raises(ValueError, match="no setting is called") as error:
        explain(key, Config)
    assert message in str(error.value)


def test_types_say_what_is_allowed() -> None:
    types = {entry.path: entry.type for entry in keys(Config)}
    assert types["seed"] == "whole number, at least 0 and below 2^63"
    assert types["lora.dropout"] == "number, at least 0 and below 1"
    assert types["lora.targets[].experts"] == "list, each item: whole number, at least 0, or null"
    assert types["optimizer"] == "section whose name is adafactor, adamw, lion or muon"
    assert types["metrics.tensorboard"] == "true or false"


def test_required_keys_have_no_default() -> None:
    defaults = {entry.path: entry.default for entry in keys(Config)}
    assert defaults["train.batch_size"] is None and defaults["model.vocab_size"] is None
    assert defaults["model"] == "null" and defaults["mesh"] == "the defaults of its keys"
