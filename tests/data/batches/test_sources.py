"""Sources as stores and rows: their names in messages, and the rule for examples that are longer than a row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train import config
from moe_train.data.batches.sources import open_rows, source_name
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.prepared.stores import stored

TEXT = config.TextRecord(name="text")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (config.FileSource(name="files", files=("a.jsonl",), record=TEXT), "a.jsonl"),
        (config.FileSource(name="files", files=("a.jsonl", "b.jsonl"), record=TEXT), "a.jsonl, …"),
        (config.PreparedSource(name="prepared", path="gs://bucket/set"), "gs://bucket/set"),
    ],
)
def test_a_source_is_named_by_its_first_place(source: config.Source, name: str) -> None:
    assert source_name(source) == name


def test_a_prepared_source_can_state_another_rule_than_its_set(
    tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    path = write_lines("a.jsonl", [{"text": "fox"}, {"text": "fox " * 40}])
    store = stored(path, record=TEXT, tokenizer=tokenizer, cache=tmp_path)
    rows_of_rule = {}
    for rule in (None, "split", "truncate", "drop"):
        source = config.PreparedSource(name="prepared", path=store.path, too_long=rule)
        plan = open_rows(source, store, 32, None, str(tmp_path)).order.plan()
        rows_of_rule[rule] = (plan.num_split, plan.num_truncated, plan.num_dropped)
    assert rows_of_rule == {None: (1, 0, 0), "split": (1, 0, 0), "truncate": (0, 1, 0), "drop": (0, 0, 1)}
