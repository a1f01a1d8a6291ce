"""A tower that is trained by two processes: saved, gathered and exported as by one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.commands.export import export
from moe_train.commands.train import train
from moe_train.commands.verify import verify
from moe_train.config import yaml_file
from moe_train.run import loop
from tests.commands.wrapper import TOWER, save_wrapper
from tests.data.hugging_face import small_tekken
from tests.integration.test_pictures import IMAGE, MODEL, TENSORS, save_records, tensors_of, written
from tests.random_parameters import random_parameters
from tests.tiny import ONE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MESH = config.Mesh(fsdp=4, tensor=2)
"""Four devices of each process hold half of every weight that is sharded over `fsdp`."""
SHORT = config.Train(steps=2, batch_size=4, seq_len=32)
FULL: dict[str, Any] = {"vision": config.Vision(patches_per_row=32, train=("vision.*",))}
ADAPTED: dict[str, Any] = {
    "lora": config.Lora(
        targets=(config.LoraTarget(modules=("attention.*", "vision.tower.*_proj"), rank=2, alpha=4.0),),
        train=("vision.projector.*",),
    )
}


def in_two_processes(compiled: Path, *arguments: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "JAX_", "TPU_"))}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = ["bash", "launch/local.sh", "2", "--", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wrapper, a tokenizer and records."""
    folder = tmp_path_factory.mktemp("towers")
    with jax.set_mesh(ONE):
        save_wrapper(folder / "base", random_parameters(MODEL), model=MODEL)
    small_tekken(folder, "v7", vocab=280, image=IMAGE)
    shutil.copyfile(folder / "tekken.json", folder / "base" / "tekken.json")
    save_records(folder / "data")
    return folder


@pytest.mark.parametrize("sections", [FULL, ADAPTED], ids=["full", "adapters"])
def test_two_processes_save_and_export_what_one_does(sections: dict[str, Any], ready: Path, compiled: Path, tmp_path: Path) -> None:
    def run(name: str) -> config.Config:
        return written(ready, run_dir=str(tmp_path / name), train=SHORT, mesh=MESH, **sections)

    (tmp_path / "run.yaml").write_text(yaml_file.dump(run("two")))
    in_two_processes(compiled, "train", str(tmp_path / "run.yaml"))
    in_two_processes(compiled, "train", str(tmp_path / "run.yaml"), "train.steps=3")
    assert train(run("one").model_copy(update={"train": SHORT.model_copy(update={"steps": 3})})) == loop.FINISHED
    merge = ("--merge",) if "lora" in sections else ()
    # In Mistral's own layout the first process alone writes what is carried.
    for layout in ("hf", "mistral"):
        out = tmp_path / f"two-{layout}"
        in_two_processes(compiled, "export", str(tmp_path / "two"), str(out), "--format", layout, *merge)
        export(tmp_path / "two", tmp_path / f"read-{layout}", layout, merge=bool(merge), options=TENSORS)  # type: ignore[arg-type]
        by_two, by_one = tensors_of(out), tensors_of(tmp_path / f"read-{layout}")
        assert by_two.keys() == by_one.keys() and all(np.array_equal(by_two[name], by_one[name]) for name in by_two)
        checks = [*verify(out, run=tmp_path / "two", depth="tensors")[1], *verify(out, base=ready / "base", depth="tensors")[1]]
        assert not [check for check in checks if check.passed is False]
    export(tmp_path / "one", tmp_path / "one-hf", merge=bool(merge), options=TENSORS)
    before, alone, together = (tensors_of(path) for path in (ready / "base", tmp_path / "one-hf", tmp_path / "two-hf"))
    for name in TOWER:
        # The order of sums differs, which AdamW scales to the learning rate where a gradient is near zero.
        assert np.allclose(alone[name], together[name], atol=1e-2), name
    moved = [name for name in TOWER if not np.array_equal(before[name], together[name])]
    assert {name for name in TOWER if "projector" in name} <= {*moved} and any("q_proj" in name for name in moved)
    if "lora" in sections:
        in_two_processes(compiled, "export", str(tmp_path / "two"), str(tmp_path / "adapter"), "--format", "peft")
        assert not [check for check in verify(tmp_path / "adapter", run=tmp_path / "two")[1] if check.passed is False]
