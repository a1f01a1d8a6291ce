"""Sets whose records or labels do not fit the objective; `commands/test_prepare_teacher.py` has those of a teacher."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_train import config
from moe_train.data.batches.answer_batches import PreferenceBatch, UnpairedBatch
from moe_train.data.batches.batch import Batch
from moe_train.data.batches.check_set import check_set, check_varied_labels
from moe_train.data.batches.classification_batch import classification_batch
from moe_train.data.batches.reward_batch import RewardBatch

ANIMAL = config.ScoreTarget(name="animal", labels=("fox", "dog"))
SPEED = config.ScoreTarget(name="speed", labels=("quick", "lazy"), several=True)


def store(kind: str = "classification", values: Any = ()) -> Any:
    rules = SimpleNamespace(record={"name": kind, "targets": [ANIMAL.model_dump(mode="json")]})
    return SimpleNamespace(
        manifest=SimpleNamespace(rules=rules, media=None),
        values=np.asarray(values),
        where=lambda i: f"a.jsonl:{i + 1}",
    )


@pytest.mark.parametrize(
    ("batch_type", "kind", "needed"),
    [
        (UnpairedBatch, "preference", "labelled"),
        (PreferenceBatch, "labelled", "preference"),
        (RewardBatch, "classification", "preference"),
        (classification_batch((ANIMAL,)), "chat", "classification"),
    ],
)
def test_records_of_another_kind(batch_type: Any, kind: str, needed: str) -> None:
    with pytest.raises(
        ValueError, match=f"set was prepared from records of kind {kind}, and the objective reads {needed}; prepare"
    ):
        check_set(batch_type, "set", store(kind), 8, "error")
    check_set(batch_type, "set", store(needed), 8, "error")
    check_set(Batch, "set", store(kind), 8, "error")


def test_other_labels() -> None:
    with pytest.raises(ValueError, match=r"set was prepared with other labels than objective\.labels"):
        check_set(classification_batch((SPEED,)), "set", store(), 8, "error")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, 0, 1, 0], [0, 1, 0, 0]], None),
        ([[1, 0, 1, 0], [1, 0, 0, 0]], r"a\.jsonl:1: this and all other texts \(2\) have the same labels of target animal \(fox\)"),
        ([[1, 0, 0, 0], [0, 1, 0, 0]], r"the same labels of target speed \(none\), so nothing tells"),
        ([[np.nan, np.nan, 1, 0], [1, 0, 0, 0]], "target animal"),
        ([[np.nan, np.nan, 1, 0], [np.nan, np.nan, 0, 0]], "have no animal"),
    ],
)
def test_labels_without_a_contrast(values: Any, message: str | None) -> None:
    if message is None:
        check_varied_labels(classification_batch((ANIMAL, SPEED)), [store(values=values[:1]), store(values=values[1:])])
        return
    with pytest.raises(ValueError, match=message):
        check_varied_labels(classification_batch((ANIMAL, SPEED)), [store(values=values)])
