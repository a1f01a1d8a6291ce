"""The commands around config files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.command import run


def test_recipes_are_listed_shown_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes") == 0
    assert "mixtral_8x7b_lora_h100x8" in capsys.readouterr().out
    assert run("recipes", "quickstart_lora") == 0
    assert "name: quickstart_lora" in capsys.readouterr().out
    assert run("recipes", "quickstart_lora", "--copy", str(tmp_path / "a.yaml")) == 0
    assert (tmp_path / "a.yaml").is_file()
    assert run("recipes", "--copy", str(tmp_path / "b.yaml")) == 2


def test_a_recipe_that_is_not_a_file_yet_is_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("inspect", "configs/quickstart_pretrain.yaml") == 2
    remedy = capsys.readouterr().err.strip().partition("write it: ")[2]
    assert remedy == "moe-train recipes quickstart_pretrain --copy configs/quickstart_pretrain.yaml"
    assert run(*remedy.split()[1:]) == 0 and Path("configs/quickstart_pretrain.yaml").is_file()
    assert run("inspect", "run.yaml") == 2 and "no such config file\n" in capsys.readouterr().err


def test_a_key_is_explained_and_a_near_miss_suggests(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", "lora", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["key"] == "lora"
    assert run("explain", "lora") == 0
    assert "lora.targets[].rank" in capsys.readouterr().out
    assert run("explain") == 0 and run("explain", "grader", "--kind", "suite") == 0
    assert run("explain", "optimizer.roundig") == 2
    assert "did you mean optimizer.rounding" in capsys.readouterr().err


def test_a_config_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("base_model: m\nsequence_len: 64\ndatasets: [{path: a.jsonl}]\nplugins: [x]\n")
    assert run("convert", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")) == 0
    out = capsys.readouterr().out
    assert "settings of axolotl written" in out and 'plugins: moe_train has no such setting (value ["x"])' in out


@pytest.mark.parametrize("kind", ["config", "suite"])
def test_the_schema_is_json(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("schema", kind) == 0
    assert json.loads(capsys.readouterr().out)["additionalProperties"] is False
