"""What is known of the segments of rows whose texts a head scores: labels, or which answer of a pair it is."""

from __future__ import annotations

import numpy as np

from moe_train.data.batches.classification_batch import ClassificationBatch
from moe_train.data.batches.reward_batch import RewardBatch


def segment_notes(batch: ClassificationBatch | RewardBatch, row: int, count: int) -> list[str]:
    """Return a note on each of the `count` segments of a row."""
    notes = []
    for number in range(1, count + 1):
        positions = np.flatnonzero(batch.segment_ids[row] == number)
        if isinstance(batch, ClassificationBatch):
            notes.append(_labels(batch, batch.labels[row, positions[-1]]))
        else:
            notes.append(_answer(batch, row, positions))
    return notes


def _labels(batch: ClassificationBatch, flags_Y: np.ndarray) -> str:
    """Return the labels of a text by target."""
    parts = []
    start = 0
    for target in batch.targets:
        flags = flags_Y[start : start + len(target.labels)]
        start += len(target.labels)
        chosen = [label for label, flag in zip(target.labels, flags, strict=True) if flag == 1]
        known = ", ".join(chosen) or "none"
        parts.append(f"{target.name}: {'not known' if flags[0] < 0 else known}")
    return "; ".join(parts)


def _answer(batch: RewardBatch, row: int, positions: np.ndarray) -> str:
    """Return which answer of which pair of the row a segment belongs to, and the pair's margin if it has one."""
    answer = int(batch.answer_ids[row, positions[0]])
    note = f"pair {(answer + 1) // 2}, {'chosen' if answer % 2 else 'rejected'}"
    margin = float(batch.margins[row, positions[-1]])
    return f"{note}, margin {margin:g}" if margin else note
