"""The search for a mesh and a batch."""

from __future__ import annotations

from moe_train.commands.plan import plan
from moe_train.config import yaml_file
from tests.plan.pretraining import PRETRAIN, SMALL


def test_a_free_batch_moves_fewer_bytes_a_token() -> None:
    given = yaml_file.load(PRETRAIN, SMALL)
    kept, free = (plan(given, "v5p:2x2x2", compile_best=0, free_batch=free).best for free in (False, True))
    assert kept is not None and free is not None
    assert kept.run.train.batch_size == 16 < free.run.train.batch_size
    assert free.received_per_token(8) < kept.received_per_token(8)


def test_only_replicas_stand_in_different_slices() -> None:
    given = yaml_file.load(PRETRAIN, [*SMALL, "mesh={data: 2, fsdp: 4}"])
    answer = plan(given, "2xv5p:2x2x1", compile_best=0)
    assert all(choice.run.mesh.data % 2 == 0 for choice in answer.choices)
    assert all(choice.work.dcn_bytes > 0 for choice in answer.choices)
    one = plan(given, "v5p:2x2x2", compile_best=0)
    assert all(choice.work.dcn_bytes == 0 for choice in one.choices)
