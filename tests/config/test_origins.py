"""Errors after a config was read: the line and the key that they are about."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.config import Config
from moe_train.config.yaml_file import read_section

TEXT = """\
run_dir: runs/a
init_from: runs/base@30
data:
  tokenizer: {path: tok}
  train:
    - {files: [a.jsonl, "data/*.jsonl"]}
    - {path: set/tokens}
  cache_dir: runs
optimizer:
  schedule: {warmup_steps: 30}
checkpoint: {best_by: kpi}
"""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("checkpoint.best_by is kpi, which is none; state loss", "{}:11: checkpoint.best_by is kpi, which is none; state loss"),
        ("optimizer.schedule: warmup_steps 30 is too long", "{}:10: optimizer.schedule: warmup_steps 30 is too long"),
        ("data: no file matches data/*.jsonl (in x)", "{}:6: data.train.0.files.1: no file matches data/*.jsonl (in x)"),
        ("no tokenizer at tok/tokenizer.json; give one", "{}:4: data.tokenizer.path: no tokenizer at tok/tokenizer.json; give one"),
        ("runs/base has no checkpoint of step 30", "{}:2: init_from: runs/base has no checkpoint of step 30"),
        ("set/tokens/manifest.json: missing", "{}:7: data.train.1.path: set/tokens/manifest.json: missing"),
        ("the run in runs/a is locked", "{}:1: run_dir: the run in runs/a is locked"),
        ("lora.rank is 3", "lora.rank is 3"),  # a key that the config does not state
        ("a.jsonl:7: bad record in a.jsonl; set data.cache_dir", "a.jsonl:7: bad record in a.jsonl; set data.cache_dir"),
        ("something else; set data.cache_dir", "something else; set data.cache_dir"),
        ("b/a.jsonl: missing, as is ba.jsonl", "b/a.jsonl: missing, as is ba.jsonl"),  # other files
        ("runs of kpi and tok end", "runs of kpi and tok end"),  # words, not files
    ],
)
def test_place_of_a_message(tmp_path: Path, message: str, expected: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(TEXT)
    assert read_section(file, Config).located(message) == expected.format(file)


def test_an_override_is_a_place(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(TEXT)
    located = read_section(file, Config, ["run_dir=runs/b"]).located("the run in runs/b is locked")
    assert located == "override run_dir=runs/b: run_dir: the run in runs/b is locked"
