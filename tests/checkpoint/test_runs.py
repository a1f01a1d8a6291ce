"""The record of a run from its checkpoint, whichever version of the package saved it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_train.checkpoint.manager import CheckpointMetadata
from moe_train.checkpoint.runs import is_run, read_run, saved_config
from tests.run.tiny_config import MODEL, data, written

TOKENIZER = {"name": "huggingface", "path": "tokenizer"}


def about(**changes: Any) -> CheckpointMetadata:
    tree = written(model=MODEL, data=data(tokenizer=TOKENIZER)).model_dump(mode="json")
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
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
