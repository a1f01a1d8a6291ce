"""The main job, shrunk to seconds; at its own size with --slow."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import typer

from moe_train.cli import main
from moe_train.commands import quickstart
from moe_train.commands.quickstart_text import gather_texts
from moe_train.config import yaml_file

SMALLER = (
    "model.vocab_size=512",
    "model.model_dim=32",
    "model.num_layers=2",
    "model.ffn={name: moe, ffn_dim: 32, num_experts: 4, experts_per_token: 2}",
)
SHORTER = (
    "mesh.fsdp=-1",
    "train={steps: 6, batch_size: 8, seq_len: 128}",
    "optimizer={name: adamw, learning_rate: 1e-3}",
    "evaluation.batches=2",
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def held_out(run: str) -> list[float]:
    lines = (quickstart.WORK / run / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if line["kind"] == "eval"]


def test_every_part_runs_and_what_is_done_is_left_alone(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = quickstart.CONFIGS
    (here / "configs").mkdir()
    for name, overrides in (("quickstart_pretrain.yaml", SMALLER + SHORTER), ("quickstart_lora.yaml", SHORTER)):
        (here / "configs" / name).write_text(yaml_file.dump(yaml_file.load_config(theirs / name, overrides)))
    monkeypatch.setattr(quickstart, "CONFIGS", here / "configs")
    monkeypatch.setattr(quickstart, "gather_texts", partial(gather_texts, max_bytes=400_000))

    assert quickstart.quickstart() == 0
    files = {file.name for folder in ("export_hf", "export_peft") for file in (quickstart.WORK / folder).iterdir()}
    assert {"model.safetensors.index.json", "generation_config.json", "tokenizer.json", "adapter_model.safetensors"} <= files
    assert len(held_out("pretrain")) == len(held_out("lora")) == 2  # before the first step and after the last

    shown = capsys.readouterr().err
    assert "losses.svg" in shown and "<polyline" in (quickstart.WORK / "losses.svg").read_text()
    assert "moe-train train my_run.yaml" in shown and "0.00" not in shown.partition("exported files")[2]

    stamps = {file: file.stat().st_mtime_ns for file in quickstart.WORK.rglob("*.safetensors")}
    assert stamps
    assert quickstart.quickstart() == 0
    assert {file: file.stat().st_mtime_ns for file in quickstart.WORK.rglob("*.safetensors")} == stamps


def test_the_next_steps_are_commands_that_exist() -> None:
    app = typer.main.get_command(main.app)
    commands = [shlex.split(line) for line in quickstart._next_steps() if line.startswith("  moe-train ")]
    assert len(commands) == 6
    for _, *arguments in commands:
        context = app.make_context("moe-train", list(arguments))
        name, command, rest = app.resolve_command(context, list(arguments))  # type: ignore[attr-defined]
        while hasattr(command, "commands"):
            name, command, rest = command.resolve_command(context, rest)
        command.make_context(name, rest)  # raises a usage error for a wrong argument


@pytest.mark.slow
def test_held_out_loss_falls_in_both_phases(here: Path) -> None:
    subprocess.run([sys.executable, "-m", "moe_train", "quickstart"], check=True)  # on one device, as people run it
    for run, fall in (("pretrain", 3.0), ("lora", 0.4)):
        losses = held_out(run)
        assert losses[-1] < losses[0] - fall, (run, losses)
