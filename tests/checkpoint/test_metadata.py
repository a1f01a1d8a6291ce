"""The metadata of checkpoints: read as they were saved, or refused with the name of the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.checkpoint.metadata import WeightOrigin, about_json, read_saved, steps_on_disk, survey
from tests.checkpoint.states import ABOUT

SUMS = {"params": [1, 2], "optimizer": [3]}


def write(run_dir: Path, step: int, loss: float | None = None) -> Path:
    file = run_dir / "checkpoints" / str(step) / "about" / "metadata"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(about_json(ABOUT, SUMS, loss)))
    return file


def test_metadata_come_back(tmp_path: Path) -> None:
    about = ABOUT._replace(base=WeightOrigin("models/base", None, {"a": "0" * 64}))
    file = write(tmp_path, 5)
    file.write_text(json.dumps(about_json(about, SUMS, 1.5)))
    assert read_saved(file.parents[1]) == (about, SUMS, 1.5)
    assert about.base is not None
    assert WeightOrigin(**json.loads(json.dumps(about.base.to_json()))) == about.base


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    file = write(tmp_path, 5, 1.5)
    content = file.read_bytes()
    for i in range(len(content)):
        file.write_bytes(content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :])
        with pytest.raises(ValueError, match="checkpoints/5/about/metadata is ") as caught:
            read_saved(file.parents[1])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"about": {}, "sums": {}}', '{"about": [], "sums": 1}', "null"])
def test_other_content_names_the_file(tmp_path: Path, content: str) -> None:
    file = write(tmp_path, 5)
    file.write_text(content)
    with pytest.raises(ValueError, match="checkpoints/5/about/metadata is "):
        read_saved(file.parents[1])


@pytest.mark.parametrize("content", ["", '{"held_out_loss"', '{"held_out_loss": "low"}', "[]"])
def test_a_damaged_loss_of_an_earlier_version_counts_as_not_measured(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path, 5)
    tree = json.loads(file.read_text())
    file.write_text(json.dumps({key: tree[key] for key in ("about", "sums")}))
    metrics = tmp_path / "checkpoints" / "5" / "metrics" / "metrics"
    metrics.parent.mkdir()
    metrics.write_text('{"held_out_loss": 1.5}')
    assert read_saved(file.parents[1]).held_out_loss == 1.5
    metrics.write_text(content)
    assert read_saved(file.parents[1]) == (ABOUT, SUMS, None)
    assert "checkpoints/5/metrics/metrics is damaged" in caplog.text


def test_a_survey_has_the_newest_first_and_names_the_best(tmp_path: Path) -> None:
    for step, loss in ((1, 2.0), (10, 1.0), (9, None), (11, 3.0), (12, 4.0)):
        write(tmp_path, step, loss)
    (tmp_path / "checkpoints" / "13.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "checkpoints" / "damaged-7").mkdir()
    (tmp_path / "checkpoints" / "12" / "about" / "metadata").write_text("")
    found = survey(tmp_path)
    assert list(found.readable) == [11, 10, 9, 1] and list(found.damaged) == [12] and found.best() == 10
    assert steps_on_disk(tmp_path / "checkpoints") == [1, 9, 10, 11, 12]
    assert survey(tmp_path / "elsewhere") == ({}, {})
