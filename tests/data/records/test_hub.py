"""Data sets of the hub: pinned to a commit, and one clear error without a network."""

from __future__ import annotations

import datasets
import pytest

from moe_train.data.records.unread import NOT_LOADED
from tests.data.records.sources import ROWS, hub, wheres

pytestmark = pytest.mark.usefixtures("no_network")


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
    assert list(records) == [((0, i + 1), row | {"other": NOT_LOADED}) for i, row in enumerate(ROWS)]
    assert asked == [(("nobody/nothing", "en"), {"split": "test", "revision": "0" * 40})]
    assert wheres(records)[2] == f"hub:nobody/nothing@{'0' * 40}/en/test: row 3"
    assert records.places[0].kind != hub(split="test").places[0].kind, "another split is other content"
