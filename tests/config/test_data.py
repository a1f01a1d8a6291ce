"""The data section: at least one source, paths of this machine, and records that a Python program holds."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train import config
from tests.config.tiny import refusal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"train": []}}, "at least 1 item"),
        ({"data.cache_dir": "gs://bucket/cache"}, "this is a URL, but a path is needed"),
        ({"data.tokenizer.name": "sentencepiece"}, "'huggingface', 'mistral'"),
    ],
)
def test_a_value_beyond_its_limit_is_refused(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(**changes)


def test_records_of_a_program_are_not_written_to_a_file() -> None:
    source = config.PythonSource(name="python", records=[{"text": "a"}], record=config.TextRecord(name="text"))
    assert source.records == [{"text": "a"}]
    assert "records" not in source.model_dump() and "text" in source.model_dump()["record"]["name"]
