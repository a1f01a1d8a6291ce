"""One run in several processes, with a single process's losses and files.

The run is started by launch/local.sh, loses a process and is started again, is asked to stop, and is brought to its end
and exported twice: by two processes under launch/slurm.sbatch with a stand-in for Slurm, and by one.
"""

from __future__ import annotations

import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.commands.export import ExportOptions, export
from moe_train.commands.train import train
from moe_train.config import yaml_file
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import parameters
from moe_train.model.transformer import init_model
from moe_train.run import loop
from moe_train.weights import external, external_adapter, on_disk, peft, safetensors_files
from tests.integration.process_worker import LAYOUTS

ROOT = Path(__file__).parents[2]
LORA = {"targets": [{"modules": ["attention.*", "ffn.*_proj"], "rank": 2, "alpha": 3.0}]}
MODEL = {
    "family": "mixtral",
    "vocab_size": 288,
    "model_dim": 32,
    "num_layers": 1,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "ffn": {"name": "moe", "ffn_dim": 16, "num_experts": 4, "experts_per_token": 2},
    "max_seq_len": 64,
    "init_stddev": 0.1,
}
SRUN = """#!/usr/bin/env bash
# As Slurm's: a task for each process, all on this host; the exit code is the highest.
while [[ "$1" == --* ]]; do shift; done
export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost SLURM_STEP_TASKS_PER_NODE=2
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" > "$TASKS/out" 2> "$TASKS/err" & other=$!
SLURM_PROCID=0 SLURM_LOCALID=0 "$@"; code=$?
wait $other; others=$?
exit $((code > others ? code : others))
"""


class Run:
    """One run of the module's tests, on its way through all of them."""

    def __init__(self, make: Callable[..., config.Config], cache: Path, folder: Path) -> None:
        self.make, self.folder, self.run_dir, self.yaml = make, folder, folder / "run", folder / "run.yaml"
        self.yaml.write_text(yaml_file.dump(make(self.run_dir)))
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "JAX_", "TPU_"))}
        self.env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
        self.env |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def events(self) -> list[dict[str, Any]]:
        file = self.run_dir / "run.json"
        return json.loads(file.read_text())["events"] if file.exists() else []

    def saved(self) -> list[int]:
        folder = self.run_dir / "checkpoints"
        return sorted(int(step.name) for step in folder.glob("*") if step.name.isdigit())

    def steps(self) -> int:
        return len((self.run_dir / "metrics.jsonl").read_text().splitlines())

    def until(self, there: Callable[[], Any], process: subprocess.Popen) -> None:
        limit = time.monotonic() + 600  # for a hang alone: a busy machine takes minutes
        while not there():
            assert process.poll() is None and time.monotonic() < limit, self.events()
            time.sleep(0.02)


@pytest.fixture(scope="module")
def run(small_run: Any, compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("job")
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        weights = parameters(init_model(0, config.Model.model_validate_json(json.dumps(MODEL)), config.Compute()))[1]
        write_and_prove.export_model(
            weights,
            config.Model.model_validate_json(json.dumps(MODEL)),
            folder / "base",
            write_and_prove.WriteOptions(dtype="float32", depth="tensors"),
        )
    changes = {
        "init_from": str(folder / "base"),
        "model": None,
        "lora": LORA,
        "loss": {"load_balance_loss_coef": 0.01, "router_z_loss_coef": 0.0},
        "mesh": {"fsdp": 4, "expert": 2},
        "data__eval": [],
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "schedule": {"name": "constant"}},
        "checkpoint": {"every_steps": 4, "keep_last": 3, "keep_best": False},
        "metrics": {"tensorboard": False, "every_steps": 1},
    }
    return Run(lambda run_dir, **more: small_run(run_dir, **(changes | more)), compiled, folder)


@pytest.fixture(scope="module")
def stopped(run: Run) -> tuple[Run, subprocess.CompletedProcess, float]:
    """Process 1 is killed after step 4; when all have been started again, it is asked to stop. With the seconds that the
    other one took to miss it."""
    command = ["bash", "launch/local.sh", "2", "--", "train", str(run.yaml), "train.steps=100000"]
    env = run.env | {"RESTARTS": "1"}
    job = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.until(lambda: 4 in run.saved(), job)
    first = process_of(run, 0)
    os.kill(process_of(run, 1), signal.SIGKILL)
    killed = time.monotonic()
    run.until(lambda: not Path(f"/proc/{first}").exists(), job)
    seconds = time.monotonic() - killed
    run.until(lambda: len(run.events()) == 2, job)
    before = run.steps()
    run.until(lambda: run.steps() > before, job)
    os.kill(process_of(run, 1), signal.SIGTERM)
    said = job.communicate(timeout=60)
    return run, subprocess.CompletedProcess(command, job.returncode, *said), seconds


def process_of(run: Run, index: int) -> int:
    """The process of a job of local.sh's with this number."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, env = ((folder / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:  # it has ended
            continue
        wanted = command[0] == sys.executable.encode() and str(run.yaml).encode() in command
        if wanted and f"JAX_PROCESS_ID={index}".encode() in env:
            return int(folder.name)
    raise AssertionError("there is none")


@pytest.mark.slow
def test_a_lost_process_ends_the_other_and_both_are_started_again(stopped: tuple[Run, subprocess.CompletedProcess, float]) -> None:
    run, job, seconds = stopped
    assert job.returncode == 75 and seconds < 60, job.stderr  # JAX itself would take minutes
    said = [line for line in job.stderr.splitlines() if not line.startswith(("[process 1]", "[Gloo]"))]
    lost = said.index("moe-train: process 1 of 2 was lost; run the same command again to continue from what was saved")
    assert said[lost - 1].startswith("step ")  # one line, and no more
    assert said[lost + 1] == "launch/again.sh: exit code 75; restarting"
    assert "[process 1] launch/again.sh: exit code 137; restarting" in job.stderr
    assert run.events()[1]["event"] == "resume" and run.events()[1]["step"] % 4 == 0


@pytest.mark.slow
def test_all_stop_at_one_step_where_one_is_asked_to(stopped: tuple[Run, subprocess.CompletedProcess, float]) -> None:
    run, job, _ = stopped
    events = run.events()
    assert [event["event"] for event in events] == ["start", "resume", "stop"]
    assert events[2]["reason"] == "another process was asked to stop"  # it is the first one's diary
    assert run.saved()[-1] == events[2]["step"]
    ours, others = (
        [line for line in job.stderr.splitlines() if line.startswith("[process 1]") is other] for other in (False, True)
    )
    enough = "launch/again.sh: exit code 75; it was restarted 1 times, the limit (RESTARTS)"
    assert enough in ours and f"[process 1] {enough}" in others
    # Process 0 alone speaks, apart from the answer of the process that got the signal.
    assert all("launch/again.sh" in line or "SIGTERM received; waiting for" in line for line in others)
    assert job.stdout == ""


@pytest.fixture(scope="module")
def both(stopped: tuple[Run, subprocess.CompletedProcess, float]) -> tuple[Run, Path, subprocess.CompletedProcess]:
    """Brought to its end by two processes, which also export it; and a copy, by this one. With the copy's folder."""
    run, copy = stopped[0], stopped[0].folder / "copy"
    shutil.copytree(run.run_dir, copy)
    programs = run.folder / "bin"
    programs.mkdir()
    worker = f'#!/bin/sh\nshift 2\nexec {sys.executable} {ROOT}/tests/integration/process_worker.py "$@"\n'
    for name, program in {"srun": SRUN, "python": worker}.items():
        (programs / name).write_text(program)
        (programs / name).chmod(0o755)
    env = run.env | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": str(programs / "python"), "TASKS": str(run.folder)}
    env |= {"SLURM_JOB_ID": str(random.SystemRandom().randrange(4000)), "SLURM_NTASKS": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
    env |= {"RUN_DIR": str(run.run_dir), "OUT_DIR": str(run.folder / "two")}
    steps = run.saved()[-1] + 3
    command = ["bash", "launch/slurm.sbatch", "train", str(run.yaml), f"train.steps={steps}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert train(run.make(copy, train__steps=steps)) == loop.FINISHED
    return run, copy, done


@pytest.mark.slow
def test_batches_and_losses_are_those_of_one_process(both: tuple[Run, Path, subprocess.CompletedProcess]) -> None:
    run, copy, done = both
    steps, alone = run.saved()[-1], run.folder / "alone"
    assert train(run.make(alone, train__steps=steps, checkpoint={"every_steps": 10**6})) == loop.FINISHED
    two, moved, one = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (run.run_dir, copy, alone)
    )
    assert f"finished {steps} steps" in done.stderr
    assert [line["step"] for line in one] == list(range(1, steps + 1))
    assert len({round(line["loss"], 3) for line in one}) > steps // 2  # a batch shows in its loss
    for other in (two, moved):
        assert [(line["step"], line["loss_tokens"]) for line in other] == [(line["step"], line["loss_tokens"]) for line in one]
        for key in ("loss", "grad_norm"):
            assert [line[key] for line in other] == pytest.approx([line[key] for line in one], rel=1e-3)


def test_two_processes_write_what_one_writes(both: tuple[Run, Path, subprocess.CompletedProcess]) -> None:
    run, _, done = both
    two, one = run.folder / "two", run.folder / "one"
    assert done.returncode == 1, done.stderr
    assert (
        "moe-train: another process could not write its part of the export; its own error gives the reason"
        in done.stderr.splitlines()
    )
    assert (run.folder / "err").read_text() == "moe-train: No space left on device\n"  # process 0 alone speaks
    assert (run.folder / "out").read_text() == ""

    for layout, options in LAYOUTS.items():
        shards = "20KB" if layout == "hf" else None
        export(
            run.run_dir,
            one / layout,
            layout,
            merge="--merge" in options,
            options=ExportOptions(depth="tensors", max_shard_size=shards),
        )  # type: ignore[arg-type]
        names = {file.name for file in (one / layout).iterdir()}
        assert names == {file.name for file in (two / layout).iterdir()}
        same = filecmp.cmpfiles(one / layout, two / layout, names - {"export_proof.json"}, shallow=False)
        assert same[1:] == ([], []), layout
        proofs = [json.loads((folder / layout / "export_proof.json").read_text()) for folder in (one, two)]
        assert proofs[0]["tensors"] == proofs[1]["tensors"] and proofs[0]["files"] == proofs[1]["files"]
        checks = [{check["name"]: check["passed"] for check in proof["checks"]} for proof in proofs]
        answered = {"answers": True} if layout == "hf" else {}  # which the first one left out
        assert checks[1] == checks[0] | answered and proofs[1]["hardware"]["processes"] == 2
    assert {path.name for path in two.iterdir()} == set(LAYOUTS)  # and nothing of the one whose disk was full

    answers, decode = [], json.JSONDecoder()
    left = done.stdout  # JSON and nothing else, from the first process alone
    while left.strip():
        answer, end = decode.raw_decode(left.lstrip())
        answers.append(answer["directory"])
        left = left.lstrip()[end:]
    assert answers == [str(two / layout) for layout in LAYOUTS]

    total = sum(file.stat().st_size for file in (two / "hf").glob("*.safetensors"))
    shares = [json.loads(Path(f"{two}.{i}.json").read_text()) for i in range(2)]
    tensors = safetensors_files.open_safetensors(two / "peft" / peft.ADAPTER_WEIGHTS).values()
    assert sum(share["adapter_read"] for share in shares) == sum(on_disk.array_bytes(t.shape, t.dtype) for t in tensors)
    written = [{name for name in share["written"] if name.startswith("model-")} for share in shares]
    assert not written[0] & written[1] and len(written[0]) == len(written[1]) == 2
    assert shares[1]["written"] == sorted(written[1])  # of one file the first process is the writer
    for share, seen in zip(shares, (two, two / "of another host"), strict=True):
        assert share["loaded"] < 0.6 * total  # half of what is split, and what all devices have
        assert 0.4 * total < share["read"] < 0.6 * total and share["hashes"] == external.hash_external_model(two / "hf")
        assert share["adapter_read"] and share["adapter_hashes"] == external_adapter.hash_external_adapter(two / "peft")
        assert share["shared"].startswith(f"{seen.parent} is not on a file system that all processes share: process ")
