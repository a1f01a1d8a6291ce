"""A run needs no network: it trains, exports and gives evidence in a network namespace, in which there is none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.config import yaml_file
from tests.run.tiny_config import MODEL, written

pytestmark = pytest.mark.slow


def has_namespaces() -> bool:
    """Whether the kernel lets this user make a network namespace."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not has_namespaces(), reason="unshare -rn is not permitted here")
def test_a_run_that_forbids_the_network_needs_none(tmp_path: Path) -> None:
    train_tokenizer(["some text to learn from"] * 5, 270, tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"some text {i}"}) + "\n" for i in range(40)))
    sections = {
        "tokenizer": {"name": "huggingface", "path": str(tmp_path / "tokenizer")},
        "train": [{"name": "files", "files": [str(tmp_path / "a.jsonl")], "record": {"name": "text"}}],
        "cache_dir": str(tmp_path / "cache"),
        "num_proc": 2,
    }
    config = written(run_dir=str(tmp_path / "run"), data=sections, model=MODEL, network="none")
    (tmp_path / "run.yaml").write_text(yaml_file.dump(config))

    def moe_train(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = ["unshare", "-rn", sys.executable, "-m", "moe_train", *words]
        return subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "JAX_PLATFORMS": "cpu", **env}, capture_output=True, text=True
        )

    for words in (
        ("data", "prepare", "run.yaml"),
        ("train", "run.yaml"),
        ("export", "run", "hf"),
        ("evidence", "hf", "evidence"),
        ("data", "find", "some text 7", "--in", "run"),
        ("verify", "hf"),
    ):
        ended = moe_train(*words, MOE_TRAIN_OFFLINE="1")
        assert ended.returncode == 0, (words, ended.stdout, ended.stderr)
        assert "refused" not in ended.stderr
    hub = '{name: hub, dataset: openai/gsm8k, revision: "' + "0" * 40 + '", record: {name: text}}'
    refused = moe_train("train", "run.yaml", f"data.train=[{hub}]")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "network is none, but data.train.0 names the data set openai/gsm8k of the hub" in refused.stderr
    refused = moe_train("train", "run.yaml", f"data.train=[{hub}]", "network=any", MOE_TRAIN_OFFLINE="1")
    assert refused.returncode == 2 and "needs a network, which MOE_TRAIN_OFFLINE=1 forbids" in refused.stderr
