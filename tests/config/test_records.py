"""The kinds of records: what each reads by default, and what becomes of a long one."""

from __future__ import annotations

import pytest

from moe_train import config
from tests.config.tiny import refusal


def test_a_long_text_is_split_and_a_long_conversation_an_error() -> None:
    assert config.TextRecord(name="text").too_long == "split"
    assert config.ChatRecord(name="chat").too_long == "error"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"name": "chat", "too_long": "split"}, "'truncate', 'drop' or 'error'"),
        ({"name": "chat", "roles": {"bot": "robot"}}, "'system', 'user', 'assistant' or 'tool'"),
        ({"name": "dialogue"}, "'text', 'chat', 'completion'"),
    ],
)
def test_a_value_beyond_its_limit_is_refused(record: dict[str, object], message: str) -> None:
    source = {"name": "files", "files": ["a.jsonl"], "record": record}
    assert message in refusal(**{"data.train": [source]})
