"""The commands around a training run: what they hand on, and what they print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.config import Config
from tests.cli.command import run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("code", [0, 75])
def test_train_hands_on_the_config_and_its_exit_code(stand_in, config_path: str, code: int) -> None:
    given: list[Config] = []

    def train(resolved: Config) -> int:
        given.append(resolved)
        return code

    stand_in("moe_train.commands.train", train=train)
    assert run("train", config_path, "train.steps=3", "name=other") == code
    assert (given[0].train.steps, given[0].name) == (3, "other")


def test_inspect(tmp_path: Path, capsys) -> None:
    path = str(ROOT / "configs" / "mixtral_8x7b_pretrain_v5p.yaml")
    assert run("inspect", path, "mesh.fsdp=8", "mesh.expert=8", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["config"]["optimizer"]["eps"] == 1e-8
    (gate,) = (row for row in answer["parameters"] if row["path"].endswith("gate_proj.weight"))
    assert gate["shape"] == [32, 8, 4096, 14336]
    assert gate["spec"] == "- expert fsdp tensor"
    assert gate["bytes_per_device"] == 32 * 4096 * 14336 * 8 * 4 // 64
    assert answer["total_parameters"] == 46_702_792_704  # as transformers counts MixtralForCausalLM of these sizes
    assert run("inspect", path, "mesh.fsdp=8", "mesh.expert=4") == 0
    shown = capsys.readouterr().out
    assert "num_experts: 8" in shown and "1,792.00 MiB" in shown and "46,702,792,704" in shown
    assert run("inspect", path, "init_from=models/none", "model=null") == 2
    assert "models/none: no such folder" in capsys.readouterr().err


def test_bench(stand_in, config_path: str, capsys) -> None:
    stand_in(
        "moe_train.commands.bench",
        bench=lambda resolved, started, profile: {"batch_size": resolved.train.batch_size, "profile": profile and str(profile)},
    )
    assert run("bench", config_path, "train.batch_size=4", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"batch_size": 4, "profile": None}
    assert run("bench", config_path, "train.batch_size=4", "--profile", "trace", "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"batch_size": 4, "profile": "trace"} and "xprof trace" in printed.err
