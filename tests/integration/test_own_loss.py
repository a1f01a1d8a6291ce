"""A whole run on a person's own loss: trained, evaluated on held-out data and resumed like any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from moe_train import config
from moe_train.run import loop
from moe_train.run.resolve import resolve
from moe_train.train.objectives.custom import custom_objective


def cross_entropy(model: Any, batch: Any, key: Any) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    hidden, _ = model(batch.tokens, batch.positions, batch.segment_ids, key)
    logprobs = jax.nn.log_softmax(model.logits(hidden))
    at_target = jnp.sum(jnp.where(batch.targets[..., None] == jnp.arange(logprobs.shape[-1]), logprobs, 0), axis=-1)
    return -jnp.sum(at_target * batch.loss_mask), jnp.sum(batch.loss_mask), {}


def metrics(run_dir: Path, kind: str, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    return [row[name] for row in rows if row["kind"] == kind]


@pytest.mark.slow
def test_cross_entropy_by_hand_trains_like_the_built_in_one(small_run: Callable[..., config.Config], tmp_path: Path) -> None:
    changes = {"train__steps": 4, "evaluation": {"every_steps": 4}}
    own = resolve(small_run(tmp_path / "own", **changes), jax.device_count())
    built_in = resolve(small_run(tmp_path / "built_in", **changes), jax.device_count())
    assert loop.train_run(own, custom_objective(cross_entropy)) == loop.train_run(built_in) == loop.FINISHED
    for kind in ("train", "eval"):
        losses = metrics(tmp_path / "own", kind, "loss")
        assert losses == pytest.approx(metrics(tmp_path / "built_in", kind, "loss"), rel=1e-4)

    shutil.rmtree(tmp_path / "own/checkpoints/4")
    before = metrics(tmp_path / "own", "train", "loss")
    assert loop.train_run(own, custom_objective(cross_entropy)) == loop.FINISHED
    assert metrics(tmp_path / "own", "train", "loss") == before
