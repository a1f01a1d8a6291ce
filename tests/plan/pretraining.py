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
LATENT = (
    "model={family: mistral4, vocab_size: 256, model_dim: 128, num_layers: 2, attention: {name: mla, num_heads: 8, "
    "q_lora_rank: 32, kv_lora_rank: 48, qk_nope_head_dim: 64, qk_rope_head_dim: 16, v_head_dim: 64, "
    "query_scaling: {beta: 0.1, original_max_seq_len: 64}}, "
    "ffn: {name: moe, ffn_dim: 256, num_experts: 8, experts_per_token: 2, num_shared_experts: 1}, "
    "rope: {name: yarn, theta: 1e4, factor: 4.0, original_max_seq_len: 64}}"
)
"""Multi-head latent attention, as an override."""


def pretrain_run(*overrides: str) -> config.Run:
    """The run of Mixtral 8x7B on fsdp 8 x expert 8, with some settings changed."""
    base = ["compute.remat=full", "mesh={fsdp: 8, expert: 8}", "train.microbatches=8"]
    return config.run_of(yaml_file.load_config(PRETRAIN, [*base, *overrides]))


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main.main([*arguments])
    return int(stop.value.code or 0)
