"""The benchmark of a config: its own step, timed."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from moe_train import config
from moe_train.commands.bench import TIMED_STEPS, WARM_UP_STEPS, bench

RUN = config.Config.model_validate_json(
    """{"name": "tiny", "run_dir": "run", "mesh": {"fsdp": 4, "expert": 2},
    "model": {"family": "mixtral", "vocab_size": 64, "model_dim": 16, "num_layers": 1,
      "attention": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8},
      "ffn": {"name": "moe", "ffn_dim": 32, "num_experts": 4, "experts_per_token": 2}},
    "train": {"tokens": 20e9, "batch_size": 16, "seq_len": 32},
    "optimizer": {"name": "adamw", "learning_rate": 1e-3, "schedule": {"name": "cosine", "warmup_steps": 2000}},
    "loss": {"load_balance_loss_coef": 0.01, "router_z_loss_coef": 0.001}}"""
)


def test_a_run_given_in_tokens_is_timed_and_learns(tmp_path: Path) -> None:
    """Its warm-up is longer than the few steps that are timed."""
    found = bench(RUN, profile=tmp_path / "trace")
    [trace] = (tmp_path / "trace").rglob("*.xplane.pb")
    assert [plane.name for plane in jax.profiler.ProfileData.from_file(str(trace)).planes]
    assert 0 < found["median_step_seconds"] < found["first_step_seconds"]
    assert found["compile_seconds"] < found["first_step_seconds"]
    assert found["tokens_per_second"] * found["median_step_seconds"] == pytest.approx(16 * 32)
    assert 0 < found["share_of_attainable"] < 1
    # the same tokens each time, at the full rate from the first step
    assert found["last_loss"] < found["first_loss"] - 1e-4 * (WARM_UP_STEPS + TIMED_STEPS)
    assert jax.device_count() == 8 and found["bytes_of_program_per_device"] > 0
