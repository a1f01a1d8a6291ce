"""What all sections share: strict types, immutable values, whole numbers written as floats, local paths."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tests.config.tiny import config_with, refusal


def test_a_section_is_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        config_with().name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("value", [1.5, True])
def test_a_whole_number_is_required(value: Any) -> None:
    assert "valid integer" in refusal(**{"train.steps": value})


@pytest.mark.parametrize("steps", [10, 10.0, 1e1])
def test_a_whole_number_may_be_written_as_a_float(steps: float) -> None:
    assert config_with(**{"train.steps": steps}).train.steps == 10


def test_a_url_is_not_a_local_path() -> None:
    message = "this is a URL, but a path is needed; state a path on this machine, or on a file system"
    assert message in refusal(init_from="gs://bucket/run")


@pytest.mark.parametrize("value", ["gs://bucket", "gs://", "s3:///run", "s3://bucket/"])
def test_a_run_in_a_bucket_has_a_folder_there(value: str) -> None:
    assert "this URL does not name a folder in a bucket" in refusal(run_dir=value)


def test_runs_in_buckets() -> None:
    for url in ("gs://bucket/runs/a", "s3://bucket/a", "file:///tmp/a"):
        assert config_with(run_dir=url).run_dir == url
    assert "average is not kept in a bucket" in refusal(run_dir="gs://bucket/a", average={"name": "ema"})
