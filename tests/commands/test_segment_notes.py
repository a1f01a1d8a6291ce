"""What is said of texts that a head scores."""

from __future__ import annotations

import numpy as np

from moe_train import config
from moe_train.commands.segment_notes import segment_notes
from moe_train.data.batches.batch import StoredPiece
from moe_train.data.batches.classification_batch import classification_batch
from moe_train.data.batches.reward_batch import RewardBatch
from moe_train.data.chat.example import SEGMENT_START


def piece(count: int, values: list[float], answers: list[int] | None = None) -> StoredPiece:
    stored = None
    if answers is not None:
        stored = np.asarray(answers, np.uint8)
        stored[np.flatnonzero(np.diff(stored, prepend=0))] += SEGMENT_START
    return StoredPiece(np.arange(count), None, answers=stored, values=np.asarray(values))


def test_labels() -> None:
    targets = (
        config.ScoreTarget(name="animal", labels=("fox", "dog")),
        config.ScoreTarget(name="speed", labels=("quick", "lazy"), several=True),
    )
    batch = classification_batch(targets).empty(1, 12)
    batch.fill_row(0, [piece(3, [0, 1, 1, 1]), piece(4, [np.nan, np.nan, 0, 0]), piece(2, [1, 0, 0, 1])])
    assert segment_notes(batch, 0, 3) == [
        "animal: dog; speed: quick, lazy",
        "animal: not known; speed: none",
        "animal: fox; speed: lazy",
    ]


def test_answers_of_pairs() -> None:
    batch = RewardBatch.empty(1, 12)
    batch.fill_row(0, [piece(5, [0.0], [1, 1, 2, 2, 2]), piece(4, [0.5], [1, 1, 2, 2])])
    assert segment_notes(batch, 0, 4) == ["pair 1, chosen", "pair 1, rejected", "pair 2, chosen, margin 0.5", "pair 2, rejected"]
