"""The record of a run from its checkpoint, whichever version of the package saved it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_train.checkpoint.metadata import CheckpointMetadata, about_json
from moe_train.checkpoint.runs import is_run, named_checkpoint, named_step, read_run, saved_config
from tests.run.tiny_config import MODEL, data, written

TOKENIZER = {"name": "huggingface", "path": "tokenizer"}


def about(**changes: Any) -> CheckpointMetadata:
    tree = written(model=MODEL, data=data(tokenizer=TOKENIZER)).model_dump(mode="json")
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree[section][name] = value
        else:
            tree[key] = value
    return CheckpointMetadata(config=tree, row=0, data="identity", base=None)


def test_a_config_comes_back_as_it_was_saved() -> None:
    assert saved_config("run", about()) == written(model=MODEL, data=data(tokenizer=TOKENIZER))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (
            {"data__packing": {"name": "first_fit"}},
            r"^run was saved by another version of moe_train: data\.packing\.name: .*'best_fit'",
        ),
        ({"train__colour": "blue"}, r"^run was saved by another version of moe_train: train\.colour: unknown key"),
    ],
)
def test_a_setting_that_cannot_be_followed_is_refused_in_one_line(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error) as caught:
        saved_config("run", about(**changes))
    assert "\n" not in str(caught.value)


def test_a_folder_without_checkpoints_is_no_run(tmp_path: Path) -> None:
    assert not is_run(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert is_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet that can be read"):
        read_run(tmp_path)


def save(run_dir: Path, step: int, loss: float | None) -> None:
    file = run_dir / "checkpoints" / str(step) / "about" / "metadata"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(about_json(about(seed=step), {"params": [], "optimizer": []}, loss)))


def test_a_checkpoint_is_named_by_its_step_as_the_best_or_as_the_newest(tmp_path: Path) -> None:
    run_dir = tmp_path / "run@home"
    for step, loss in ((10, 2.0), (30, 1.0), (40, None)):
        save(run_dir, step, loss)
    assert named_checkpoint(run_dir) == (run_dir, "")
    assert [named_step(f"{run_dir}{which}") for which in ("", "@10", "@best", "@newest")] == [None, 10, 30, None]
    assert [read_run(f"{run_dir}{which}").seed for which in ("", "@10", "@best", "@newest")] == [40, 10, 30, 40]
    assert is_run(f"{run_dir}@best") and not is_run(f"{tmp_path}@best")
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint of step 20; it has 10, 30, 40"):
        read_run(f"{run_dir}@20")
    with pytest.raises(ValueError, match=r"run@home@last names no checkpoint of .*; state .*@STEP, .*@best or .*@newest"):
        read_run(f"{run_dir}@last")


def test_the_best_needs_a_held_out_loss(tmp_path: Path) -> None:
    save(tmp_path / "run", 10, None)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of .* has a held-out loss"):
        named_step(f"{tmp_path}/run@best")
