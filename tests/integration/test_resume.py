"""A run that dies and starts again is the run that did not die: batches and losses, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.config import yaml_file

WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).parents[2]
ROUTER = {"name": "sigmoid", "bias": True}
MOE = {"name": "moe", "ffn_dim": 48, "num_experts": 4, "experts_per_token": 2, "router": ROUTER, "num_shared_experts": 1}
LOSS = {"load_balance_loss_coef": 0.01, "router_z_loss_coef": 0.001, "bias_update_rate": 0.01}


def work(devices: int, compiled: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.run([sys.executable, str(WORKER), *arguments], env=env, capture_output=True, text=True, timeout=300)


def figures(run_dir: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    keys = ("kind", "step", "loss", "cross_entropy", "grad_norm", "loss_tokens", "load", "dropped")
    return [tuple(str(line.get(key)) for key in keys) for line in lines]


def losses(run_dir: Path) -> list[float]:
    return [float(loss) for kind, _, loss, *_ in figures(run_dir) if kind == "train"]


def batches(run_dir: Path) -> list[str]:
    return (run_dir / "batches.txt").read_text().split()


def events(run_dir: Path) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in json.loads((run_dir / "run.json").read_text())["events"]]


@pytest.fixture
def moe_run(small_run):
    """`moe_run(run_dir, mesh)`: 10 steps of a tiny sparse model, a checkpoint every 5; biases that rules move, and drops."""
    changes = {"model__family": "mixtral", "model__ffn": MOE, "loss": LOSS, "export": "none"}
    changes |= {"train__capacity_factor": 1.0, "train__max_drop_rate": 0.9}
    often = {"train__steps": 10, "checkpoint__every_steps": 5, "evaluation__every_steps": 4, "checkpoint__keep_best": False}
    return lambda run_dir, mesh: small_run(run_dir, mesh=mesh, **changes, **often)


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_ten_steps_equal_five_then_kill_then_five(tmp_path: Path, moe_run, compiled: Path, devices: int):
    path = tmp_path / "run.yaml"
    path.write_text(yaml_file.dump(moe_run(tmp_path, {"fsdp": 2, "expert": 2, "tensor": 2} if devices == 8 else {})))
    whole, broken, moved = (tmp_path / name for name in ("whole", "broken", "moved"))

    died = work(devices, compiled, str(path), "7", "SIGKILL", f"run_dir={broken}")
    assert died.returncode == -9, died.stderr
    assert events(broken) == [("start", 0)] and (broken / "checkpoints" / "5").is_dir()
    before = batches(broken)
    assert len(before) >= 8  # the next batch is put on the devices ahead of time

    runs = [f"run_dir={broken}", f"run_dir={whole}"]
    if devices == 8:
        shutil.copytree(broken, moved)
        runs.append(f"run_dir={moved},mesh.data=2,mesh.fsdp=4,mesh.expert=1,mesh.tensor=1")
    done = work(devices, compiled, str(path), "0", "SIGKILL", *runs)
    assert done.returncode == 0, done.stderr

    assert events(broken) == [("start", 0), ("resume", 5), ("stop", 10)]
    assert figures(broken) == figures(whole)
    assert len(batches(whole)) == len(set(batches(whole))) == 10
    assert before == batches(whole)[: len(before)]
    assert batches(broken)[len(before) :] == batches(whole)[5:]
    assert losses(whole)[-1] < losses(whole)[0] - 0.5
    if devices == 8:
        assert batches(moved)[len(before) :] == batches(whole)[5:]
        assert losses(moved)[:5] == losses(whole)[:5]
        assert losses(moved) == pytest.approx(losses(whole), rel=1e-4)
        assert "changed since the checkpoint: mesh.fsdp 2 -> 4" in done.stderr
    loads = [json.loads(load) for kind, *_, load, _ in figures(whole) if kind == "train"]
    assert all(any(json.loads(dropped)) for kind, *_, dropped in figures(whole) if kind == "train")
    assert all(abs(sum(row) - 1) < 1e-5 for step in loads for row in step) and len(loads[0]) == 2


def test_sigterm_saves_and_says_unfinished(tmp_path: Path, moe_run, compiled: Path):
    """As a scheduler does it to a process; `test_loop` starts such a run again."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml_file.dump(moe_run(tmp_path, {})))
    stopped = work(1, compiled, str(path), "6", "SIGTERM", f"run_dir={tmp_path / 'stopped'}")
    assert stopped.returncode == 75, stopped.stderr
    steps = sorted(int(folder.name) for folder in (tmp_path / "stopped" / "checkpoints").iterdir())
    assert steps[0] == 5 and 7 <= steps[1] <= 9
    assert events(tmp_path / "stopped") == [("start", 0), ("stop", steps[1])]
    assert f"stopped after step {steps[1]} of 10 (SIGTERM) and saved; start again to continue" in stopped.stderr
