"""The runs of a sweep, before any of them is trained."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from moe_train.commands.sweep import commands_of, sweep_runs
from moe_train.config.strict_yaml import ConfigError

RUN = """\
name: tiny
run_dir: runs/tiny
init_from: models/tiny
train: {steps: 10, batch_size: 8, seq_len: 32}
optimizer: {name: adamw, learning_rate: 1e-4}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(RUN)
    return file


def test_all_combinations(path: Path) -> None:
    runs = sweep_runs(path, ["train.steps=20", "optimizer.learning_rate=1e-4,3e-4", "seed=0, 1"])
    assert [(run.config.optimizer.learning_rate, run.config.seed) for run in runs] == [(1e-4, 0), (1e-4, 1), (3e-4, 0), (3e-4, 1)]
    assert runs[0].config.run_dir == "runs/tiny/learning_rate=1e-4,seed=0" and runs[3].config.train.steps == 20
    words = shlex.split(commands_of(path, runs)[1])
    assert words[:4] == ["moe-train", "train", str(path), "train.steps=20"]
    assert words[-1] == "run_dir=runs/tiny/learning_rate=1e-4,seed=1"


def test_commas_inside_of_a_value(path: Path) -> None:
    runs = sweep_runs(path, ["optimizer.no_decay=[norms,biases],[norms]", "optimizer.schedule={name: linear, warmup_steps: 2}"])
    assert [len(run.config.optimizer.no_decay) for run in runs] == [2, 1]
    assert len({run.config.run_dir for run in runs}) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1"], "a sweep needs a setting with several values"),
        (["seed=1,1"], "a value is stated twice"),
        (["seed=0,x"], "seed"),
        (["seeds=0,1"], "seeds: unknown key"),
    ],
)
def test_what_is_refused(path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        sweep_runs(path, overrides)
    assert message in str(error.value)
