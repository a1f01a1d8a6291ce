"""The config of a pretraining run, made small, and the command that plans it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train import config
from moe_train.cli import main
from moe_train.config import yaml_file

PRETRAIN = str(Path(__file__).parents[2] / "configs/mixtral_8x7b_pretrain_v5p.yaml")
SMALL = ["model.num_layers=4", "model.model_dim=512", "model.ffn.ffn_dim=1024", "train.batch_size=16", "train.microbatches=1"]
SMALL += ["model.attention={num_heads: 8, num_kv_heads: 4, head_dim: 64}", "mesh={fsdp: 8}"]


def pretrain_run(*overrides: str) -> config.Run:
    """The run of Mixtral 8x7B on fsdp 8 x expert 8, with some settings changed."""
    base = ["compute.remat=full", "mesh={fsdp: 8, expert: 8}", "train.microbatches=8"]
    return config.run_of(yaml_file.load_config(PRETRAIN, [*base, *overrides]))


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main.main([*arguments])
    return int(stop.value.code or 0)
