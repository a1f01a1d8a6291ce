"""Sizes of pictures from the files of a processor, in the forms that transformers 4 and 5 write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.data.pictures.rules import PictureRules
from moe_train.data.tokenizers.processor_files import read_processor_rules

IDS = {"[IMG]": 10, "[IMG_BREAK]": 12, "[IMG_END]": 13}


@pytest.mark.parametrize(
    "files",
    [
        {"preprocessor_config": {"patch_size": {"height": 14, "width": 14}, "size": {"longest_edge": 1540}}},
        {"processor_config": {"image_processor": {"patch_size": 14, "size": {"longest_edge": 1540}}, "image_token": "[IMG]"}},
    ],
)
def test_sizes_are_read(files: dict[str, object], tmp_path: Path) -> None:
    for name, fields in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(fields))
    assert read_processor_rules(tmp_path, IDS.get) == (PictureRules(14, 1, 1540, 10, 12, 13), "")
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"patch_size": 14, "size": {"longest_edge": 9}, "spatial_merge_size": 2})
    )
    assert read_processor_rules(tmp_path, IDS.get).rules.cell_size == 2  # type: ignore[union-attr]


def test_nothing_is_made_up(tmp_path: Path) -> None:
    assert read_processor_rules(tmp_path, IDS.get).rules is None
    (tmp_path / "processor_config.json").write_text(json.dumps({"patch_size": 0, "size": {"longest_edge": 8}}))
    assert "patch_size" in read_processor_rules(tmp_path, IDS.get).fault
    assert "[IMG]" in read_processor_rules(tmp_path, {}.get).fault
