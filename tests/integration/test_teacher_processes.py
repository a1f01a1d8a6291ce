"""A teacher asked, and reference log-probabilities computed, by two processes: the sets of one process."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.commands.prepare import TeacherOptions, prepare
from moe_train.config import yaml_file
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.weights import texts
from tests.evaluate.tiny_generator import MIXTRAL, ONE, random_model

pytestmark = pytest.mark.slow

PAIRS = [{"prompt": f"say {n}", "chosen": "fox " * (n % 4 + 1), "rejected": "dog " * (n % 3 + 1) + "no"} for n in range(12)]


def in_two_processes(*arguments: str) -> list[int]:
    """The exit codes of a command that is a job of two processes with two devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(Path(__file__).parents[2])}
    env |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    command = [sys.executable, "-m", "moe_train", *arguments]
    processes = [subprocess.Popen(command, env=env | {"JAX_PROCESS_ID": str(index)}) for index in range(2)]
    return [process.wait(timeout=600) for process in processes]


@pytest.fixture(scope="module")
def model(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = MIXTRAL.model_copy(update={"vocab_size": 288})
    options = write_and_prove.WriteOptions(dtype="float32", texts=texts.Texts(HuggingFace(text / "tokenizer")), depth="tensors")
    folder = tmp_path_factory.mktemp("teacher") / "model"
    with jax.set_mesh(ONE):
        write_and_prove.export_model(random_model(sizes)[1], sizes, folder, options)
    return folder


def files_of(folder: Path, pattern: str) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob(pattern)) if file.is_file()}


def test_a_teacher_is_asked_by_both_and_continues_where_it_was_stopped(
    small_run: Callable[..., config.Config], model: Path, text: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"objective": {"name": "distillation", "top_k": 8}, "data__cache_dir": str(tmp_path / "shared")}
    run = small_run(tmp_path / "run", **changes)
    (tmp_path / "run.yaml").write_text(yaml_file.dump(run))
    command = ("data", "prepare", str(tmp_path / "run.yaml"), "--teacher", str(model))
    assert in_two_processes(*command) == [0, 0]
    made = files_of(tmp_path / "shared", "teacher-*/**/*")
    assert len({Path(name).parts[0] for name in made}) == 2  # training and held-out data
    # Interrupted after two examples, and continued.
    [whole, _] = sorted((tmp_path / "shared").glob("teacher-*[!k]"))
    unfinished = whole.with_suffix(".unfinished")
    whole.rename(unfinished)
    (unfinished / "manifest.json").unlink()
    [shard] = [path for path in unfinished.iterdir() if path.is_dir()]
    np.fromfile(shard / "teacher_offsets", np.int64)[:3].tofile(shard / "teacher_offsets")
    assert in_two_processes(*command) == [0, 0]
    again = files_of(tmp_path / "shared", "teacher-*/**/*")
    assert again.keys() == made.keys()
    alone = run.model_copy(update={"data": run.data.model_copy(update={"cache_dir": str(tmp_path / "alone")})})  # type: ignore[union-attr]
    prepare(alone, teacher=TeacherOptions(model))
    expected = files_of(tmp_path / "alone", "teacher-*/**/*")
    for files in (made, again):
        assert files.keys() == expected.keys()
        for name, content in files.items():
            if Path(name).name == "teacher_logprobs":
                np.testing.assert_allclose(np.frombuffer(content, np.float16), np.frombuffer(expected[name], np.float16), rtol=2e-3)
            elif Path(name).name in ("teacher_ids", "teacher_offsets", "tokens", "offsets"):
                assert content == expected[name], name


def test_references_are_computed_by_both(small_run: Callable[..., config.Config], model: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    source = {"name": "files", "files": [str(tmp_path / "pairs.jsonl")], "record": {"name": "preference"}}
    run = small_run(
        tmp_path / "run",
        init_from=str(model),
        model=None,
        objective={"name": "preference"},
        loss={"load_balance_loss_coef": 0.0, "router_z_loss_coef": 0.0},
        mesh={"fsdp": -1},
        train__seq_len=64,
        data__train=[source],
        data__eval=[],
        data__cache_dir=str(tmp_path / "cache"),
    )
    (tmp_path / "run.yaml").write_text(yaml_file.dump(run))
    assert in_two_processes("data", "prepare", str(tmp_path / "run.yaml"), "--reference") == [0, 0]
    [folder] = (tmp_path / "cache").glob("tokens-*/reference-*")
    made = files_of(folder, "*")
    shutil.rmtree(folder)
    prepare(run, with_reference=True)
    expected = files_of(folder, "*")
    assert made.keys() == expected.keys() == {"about.json", "experts", "logprobs"}
    np.testing.assert_allclose(*(np.frombuffer(files["logprobs"], np.float32) for files in (made, expected)), rtol=1e-4, atol=1e-5)
    assert made["experts"] == expected["experts"]
