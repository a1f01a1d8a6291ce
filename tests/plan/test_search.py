"""The search for a mesh and a batch."""

from __future__ import annotations

import pytest

from moe_train import config
from moe_train.commands.plan import plan_run
from moe_train.config import yaml_file
from moe_train.plan import search
from moe_train.plan.answer import PlanOptions
from moe_train.plan.choice import model_choice
from moe_train.plan.topology import parse_topology
from tests.plan.pretraining import PRETRAIN, SMALL, pretrain_run


def test_a_free_batch_moves_fewer_bytes_a_token() -> None:
    given = yaml_file.load_config(PRETRAIN, SMALL)
    kept, free = (plan_run(given, "v5p:2x2x2", PlanOptions(compile_best=0, free_batch=free)).best for free in (False, True))
    assert kept is not None and free is not None
    assert kept.run.train.batch_size == 16 < free.run.train.batch_size
    assert free.received_per_token(8) < kept.received_per_token(8)


def test_only_replicas_stand_in_different_slices() -> None:
    given = yaml_file.load_config(PRETRAIN, [*SMALL, "mesh={data: 2, fsdp: 4}"])
    answer = plan_run(given, "2xv5p:2x2x1", PlanOptions(compile_best=0))
    assert all(choice.run.mesh.data % 2 == 0 for choice in answer.choices)
    assert all(choice.work.dcn_bytes > 0 for choice in answer.choices)
    one = plan_run(given, "v5p:2x2x2", PlanOptions(compile_best=0))
    assert all(choice.work.dcn_bytes == 0 for choice in one.choices)


@pytest.fixture(scope="module")
def given() -> config.Run:
    return pretrain_run(*SMALL)


def test_meshes_hold_all_devices_and_keep_the_context(given: config.Run) -> None:
    found = list(search.meshes(given, parse_topology("v5p:2x2x2")))
    assert len(found) == len(set(found)) == 20  # ways to hand three factors of two to four axes
    with_context = given.model_copy(update={"mesh": config.Mesh(context=3)})
    with pytest.raises(ValueError, match=r"mesh.context 3 does not divide the 8 devices of v5p:2x2x2; use 2"):
        list(search.meshes(with_context, parse_topology("v5p:2x2x2")))


def test_choices_that_fit_come_first(given: config.Run) -> None:
    choice = model_choice(given, parse_topology("v5p:2x2x2"))
    too_large = choice._replace(limit=choice.memory.total - 1)
    slow = choice._replace(time=choice.time._replace(waited=choice.time.waited + choice.time.step))
    assert search.ranked([too_large, slow, choice]) == [choice, slow, too_large]
    assert search.ranked([slow, choice], by="bytes") == [choice, slow]
