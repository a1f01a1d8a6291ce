"""The config in a checkpoint, also in one that another version wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train.checkpoint.runs import saved_config
from moe_train.config import Config


def test_a_saved_config_is_read_back(small_run: Callable[..., Config], tmp_path: Path) -> None:
    run = small_run(tmp_path)
    assert saved_config(run.model_dump(mode="json"), tmp_path) == run


def test_a_key_of_another_version_is_named_in_one_line(small_run: Callable[..., Config], tmp_path: Path) -> None:
    fields = small_run(tmp_path).model_dump(mode="json")
    fields["data"]["packing"] = {"name": "best_fit"}
    with pytest.raises(ValueError, match=r"^[^\n]* saved by another version of moe_train: data\.packing: unknown key; [^\n]*$"):
        saved_config(fields, "runs/old")
