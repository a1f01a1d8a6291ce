"""An export is verified later: exit codes, and the checks that damage fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from moe_train.cli import main
from moe_train.commands.verify import verify
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.machine.mesh import make_mesh
from tests.commands.runs import MESH, MODEL, save_run
from tests.random_parameters import random_parameters


def test_verify_says_what_it_found_with_its_exit_code(
    small_tokenizer: HuggingFace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with jax.set_mesh(make_mesh(MESH)):
        save_run(tmp_path / "run", random_parameters(MODEL), small_tokenizer)

    def verified(*arguments: str) -> tuple[int, dict[str, Any]]:
        with pytest.raises(SystemExit) as ended:
            main.main(["verify", str(tmp_path / "hf"), "--json", *arguments])
        return int(ended.value.code or 0), json.loads(capsys.readouterr().out)

    with pytest.raises(SystemExit) as ended:
        main.main(["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--proof", "tensors"])
    assert not ended.value.code and "not checked" in capsys.readouterr().out
    record = json.loads((tmp_path / "hf/export_proof.json").read_text())
    assert record["step"] == 1 and len(record["config_sha256"]) == 64 and record["run"] == "run"
    code, found = verified("--run", str(tmp_path / "run"))
    checks = {check["name"]: check["passed"] for check in found["checks"]}
    assert code == 0 and found["passed"] and checks["merge"] and checks["answers"] is None

    (shard,) = (tmp_path / "hf").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    code, found = verified()
    assert code == 1 and {check["name"] for check in found["checks"] if check["passed"] is False} == {"files", "tensors"}
    code, found = verified("--run", str(tmp_path / "run"))
    (merge,) = (check for check in found["checks"] if check["name"] == "merge")
    assert merge["said"].endswith("is not head.weight[] in memory")


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A directory with the record of an export, and nothing else."""
    content = {"files": {}, "tensors": {}, "format": "peft", "model": MODEL.model_dump(mode="json")}
    (tmp_path / "export_proof.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "a"}, "--adapter needs --base, the model that it was merged into, and excludes --run"),
        ({"adapter": "a", "base": "b"}, "contains an adapter, not a merged model; compare it with its run"),
        ({"run": "nowhere"}, "--run nowhere is not a run; state the directory of the run that was exported"),
    ],
)
def test_options_that_do_not_go_together_are_refused(record: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify(record, **options)


def test_only_an_export_can_be_verified(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no export_proof\.json; only directories that `moe-train export` wrote"):
        verify(tmp_path)
