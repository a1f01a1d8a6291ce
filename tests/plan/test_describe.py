"""Meshes, differences and reasons in words."""

from __future__ import annotations

import pytest

from moe_train import config
from moe_train.plan.choice import Choice, model_choice
from moe_train.plan.describe import changed_settings, describe_mesh, explain
from moe_train.plan.topology import parse_topology
from tests.plan.pretraining import SMALL, pretrain_run


@pytest.fixture(scope="module")
def choice() -> Choice:
    return model_choice(pretrain_run(*SMALL), parse_topology("v5p:2x2x2"))


def test_a_mesh_is_described_by_its_axes() -> None:
    assert describe_mesh(config.Mesh(fsdp=4, tensor=2)) == "fsdp 4 x tensor 2"
    assert describe_mesh(config.Mesh()) == "one device"


def test_a_choice_that_is_not_the_best_says_why(choice: Choice) -> None:
    slow = choice._replace(time=choice.time._replace(waited=choice.time.waited + choice.time.step))
    assert explain(slow, choice) == "100% slower, 1.00 x the bytes"
    assert explain(choice, slow) == "50% faster, 1.00 x the bytes"
    assert explain(choice, choice) == "as fast, 1.00 x the bytes"
    too_large = choice._replace(limit=choice.memory.total - 1)
    assert explain(too_large, choice).startswith("does not fit: ")
    refused = choice._replace(refused="RESOURCE_EXHAUSTED")
    assert explain(refused, choice) == "the compiler refuses it: RESOURCE_EXHAUSTED" and not refused.fits


def test_changed_settings_are_named_as_in_the_config(choice: Choice) -> None:
    given = choice.run
    other = given.model_copy(
        update={"mesh": config.Mesh(fsdp=2, expert=4), "train": given.train.model_copy(update={"microbatches": 2})}
    )
    assert changed_settings(given, other) == {"mesh.fsdp": 2, "mesh.expert": 4, "train.microbatches": 2}
    assert changed_settings(given, given) == {}
