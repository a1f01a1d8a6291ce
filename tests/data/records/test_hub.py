"""Data sets of the hub: pinned to a commit, and one clear error without a network."""

from __future__ import annotations

import datasets
import pytest

from moe_train import config
from moe_train.data.records.open_source import open_source
from moe_train.data.records.source import OpenSource

ROWS = [{"text": "one"}, {"text": "zwei, ü"}, {"text": "三"}]
TEXT = config.TextRecord(name="text")


def hub(**settings: object) -> OpenSource:
    section = {"name": "hub", "dataset": "nobody/nothing", "revision": "0" * 40, "record": TEXT} | settings
    return open_source(config.HubSource.model_validate(section))


def test_the_hub_without_a_network_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"hub:nobody/nothing@0000.* cannot be had .*use files") as caught:
        list(hub())
    assert "\n" not in str(caught.value)


def test_the_hub_needs_a_commit() -> None:
    with pytest.raises(ValueError, match="revision main of nobody/nothing can move"):
        hub(revision="main")


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*arguments: object, **settings: object) -> datasets.Dataset:
        asked.append((arguments, settings))
        return datasets.Dataset.from_list([row | {"other": 1} for row in ROWS])

    monkeypatch.setattr(datasets, "load_dataset", load)
    records = hub(subset="en", split="test")
    assert list(records) == [((0, i + 1), row) for i, row in enumerate(ROWS)]
    assert asked == [(("nobody/nothing", "en"), {"split": "test", "revision": "0" * 40})]
    assert [records.where(origin) for origin, _ in records][2] == f"hub:nobody/nothing@{'0' * 40}/en/test: row 3"
    assert records.places[0].kind != hub(split="test").places[0].kind, "another split is other content"
