"""Two processes that hold one model between them write one export, and each reads only what its devices need."""

from __future__ import annotations

import filecmp
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax

from moe_train.mesh import make_mesh
from tests.weights import two_processes

ROOT = Path(__file__).parents[2]


def run(out_dir: Path, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT), "JAX_NUM_PROCESSES": "2"}
    env |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, str(ROOT / "tests/weights/two_processes.py"), str(out_dir), *arguments]
    started = [
        subprocess.Popen(command, env={**env, "JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    said = [process.communicate(timeout=240) for process in started]
    return [subprocess.CompletedProcess(command, p.returncode, *text) for p, text in zip(started, said, strict=True)]


def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    for process in run(tmp_path / "two"):
        assert process.returncode == 0, process.stderr
    with jax.set_mesh(make_mesh(two_processes.MESH)):
        two_processes.export(tmp_path / "one")
    names = {file.name for file in (tmp_path / "one").iterdir()}
    assert names == {file.name for file in (tmp_path / "two").iterdir()} and len(names) > 8
    same = filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", names - {"export_proof.json"}, shallow=False)
    assert same[1:] == ([], [])
    one, two = (json.loads((tmp_path / name / "export_proof.json").read_text()) for name in ("one", "two"))
    assert one["tensors"] == two["tensors"] and one["files"] == two["files"] and two["hardware"]["processes"] == 2
    assert {c["name"]: c["passed"] for c in one["checks"]} == {c["name"]: c["passed"] for c in two["checks"]}
    total = sum(file.stat().st_size for file in (tmp_path / "two").glob("*.safetensors"))
    for i in range(2):  # half of what is split, and the norms and routers that every device has
        assert json.loads((tmp_path / f"two.{i}.json").read_text()) < 0.55 * total


def test_a_disk_that_is_full_for_one_stops_both_and_leaves_nothing(tmp_path: Path) -> None:
    first, second = run(tmp_path / "out", "full")
    assert first.returncode and second.returncode
    assert "another process could not write its part" in first.stderr and "No space left on device" in second.stderr
    assert not list(tmp_path.iterdir())
