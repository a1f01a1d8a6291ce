"""`moe-train convert`: the trainer is recognized, faults are named, and nothing is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.commands.convert import convert_config, recognize
from tests.config.conversion.theirs import converted


def test_a_config_without_the_signs_of_a_trainer_is_refused() -> None:
    assert recognize({"base_model": "m", "sequence_len": 8}) == "axolotl"
    for tree in ({"learning_rate": 1}, {"stage": "sft", "max_length": 8}):
        with pytest.raises(ValueError, match="state it with --trainer: one of axolotl"):
            recognize(tree)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "`key: value` pairs"),
        ("base_model: m\nlearning_rate: fast\n", "learning_rate has to be a number"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        converted(tmp_path, text)


def test_an_existing_file_stays(tmp_path: Path) -> None:
    (tmp_path / "ours.yaml").write_text("mine")
    with pytest.raises(FileExistsError):
        converted(tmp_path, "base_model: m\n")
    assert (tmp_path / "ours.yaml").read_text() == "mine"


def test_what_keeps_the_file_from_loading_is_a_remark(tmp_path: Path) -> None:
    theirs = tmp_path / "my run.yaml"
    theirs.write_text("base_model: m\nsequence_len: 8\ndatasets: []\n")
    conversion = convert_config(theirs, tmp_path / "ours.yaml")
    assert any(line.startswith("it does not load yet: data.train: ") for line in conversion.remarks)
    text = (tmp_path / "ours.yaml").read_text()
    assert "name: my-run\n" in text and all(f"# - {line}" in text for line in conversion.remarks)
