"""The plan of a run: ranked without the devices, from the stated mesh where that one fits."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moe_train import config
from moe_train.commands.plan import plan_run
from moe_train.plan.answer import PlanOptions


def written(**mesh: int) -> config.Config:
    tree: dict[str, Any] = {
        "name": "tiny",
        "run_dir": "run",
        "model": {
            "family": "mistral",
            "vocab_size": 512,
            "model_dim": 512,
            "num_layers": 2,
            "attention": {"num_heads": 8, "num_kv_heads": 4, "head_dim": 64},
            "ffn": {"name": "dense", "ffn_dim": 1024},
        },
        "train": {"steps": 2, "batch_size": 24, "seq_len": 512},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "mesh": mesh,
    }
    return config.Config.model_validate(tree, strict=False)


def test_the_stated_mesh_is_filled_with_the_devices_of_the_topology() -> None:
    answer = plan_run(written(fsdp=-1, tensor=2), "tpu7x-8", PlanOptions(compile_best=0))
    assert answer.stated is not None and answer.stated.run.mesh == config.Mesh(fsdp=4, tensor=2)
    assert answer.stated.compiled is None and answer.best in answer.choices


def test_a_mesh_that_the_topology_cannot_fill_is_chosen_anyway() -> None:
    answer = plan_run(written(data=3, fsdp=-1), "tpu7x-8", PlanOptions(compile_best=0))
    assert answer.choices and all(math.prod(choice.run.mesh.model_dump().values()) == 8 for choice in answer.choices)
    with pytest.raises(ValueError, match="mesh axes of 3 devices do not divide the 8 available devices"):
        plan_run(written(data=3, fsdp=-1), "tpu7x-8", PlanOptions(compile_only=True))
