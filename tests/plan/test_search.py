"""The search for a mesh and a batch."""

from __future__ import annotations

import dataclasses

import pytest

from moe_train import config
from moe_train.commands.plan import plan_run
from moe_train.config import yaml_file
from moe_train.machine.devices import DEVICES
from moe_train.plan import search
from moe_train.plan.answer import Options
from moe_train.plan.topology import parse
from tests.plan.pretraining import PRETRAIN, SMALL, pretrain_run


def test_a_free_batch_moves_fewer_bytes_a_token() -> None:
    given = yaml_file.load_config(PRETRAIN, SMALL)
    kept, free = (plan_run(given, "v5p:2x2x2", Options(compile_best=0, free_batch=free)).best for free in (False, True))
    assert kept is not None and free is not None
    assert kept.run.train.batch_size == 16 < free.run.train.batch_size
    assert free.received_per_token(8) < kept.received_per_token(8)


def test_only_replicas_stand_in_different_slices() -> None:
    given = yaml_file.load_config(PRETRAIN, [*SMALL, "mesh={data: 2, fsdp: 4}"])
    answer = plan_run(given, "2xv5p:2x2x1", Options(compile_best=0))
    assert all(choice.run.mesh.data % 2 == 0 for choice in answer.choices)
    assert all(choice.work.dcn_bytes > 0 for choice in answer.choices)
    one = plan_run(given, "v5p:2x2x2", Options(compile_best=0))
    assert all(choice.work.dcn_bytes == 0 for choice in one.choices)


@pytest.fixture(scope="module")
def given() -> config.Run:
    return pretrain_run(*SMALL)


def test_meshes_hold_all_devices_and_keep_the_context(given: config.Run) -> None:
    found = list(search.meshes(given, parse("v5p:2x2x2")))
    assert len(found) == len(set(found)) == 20  # ways to hand three factors of two to four axes
    with_context = given.model_copy(update={"mesh": config.Mesh(context=3)})
    with pytest.raises(ValueError, match=r"mesh.context 3 does not divide the 8 devices of v5p:2x2x2; use 2"):
        list(search.meshes(with_context, parse("v5p:2x2x2")))


def test_choices_that_fit_come_first_and_the_others_say_why(given: config.Run) -> None:
    choice = search.model_choice(given, parse("v5p:2x2x2"))
    tight = choice._replace(limit=choice.memory.total - 1)
    refused = choice._replace(refused="RESOURCE_EXHAUSTED")
    slow = choice._replace(time=choice.time._replace(waited=choice.time.waited + choice.time.step))
    assert search.ranked([tight, slow, choice])[:2] == [choice, slow] and search.ranked([slow, choice], by="bytes") == [
        choice,
        slow,
    ]
    assert search.why(slow, choice) == "100% slower, 1.00 x the bytes"
    assert search.why(tight, choice).startswith("does not fit: ")
    assert search.why(refused, choice) == "the compiler refuses it: RESOURCE_EXHAUSTED" and not refused.fits


def test_changed_settings_are_named_as_in_the_config(given: config.Run) -> None:
    other = given.model_copy(
        update={"mesh": config.Mesh(fsdp=2, expert=4), "train": given.train.model_copy(update={"microbatches": 2})}
    )
    assert search.changed(given, other) == {"mesh.fsdp": 2, "mesh.expert": 4, "train.microbatches": 2}
    assert search.changed(given, given) == {}


@pytest.mark.parametrize(
    ("name", "larger"), [("h100x4", ["h100x8", "2xh100x8", "4xh100x8"]), ("v5e:4x4", ["v5e:4x8"]), ("v5p:2x2x4", ["v5p:2x4x4"])]
)
def test_larger_topologies_of_the_same_device(name: str, larger: list[str]) -> None:
    assert search.larger(parse(name), chips=32) == larger


def test_where_a_price_comes_from() -> None:
    assert search.price_of(DEVICES["v5p"], 2.5) == (2.5, "--price")
    unknown = dataclasses.replace(DEVICES["v5p"], dollars_per_hour=None)
    assert search.price_of(unknown, None) == (None, "no list price is known; state --price")
