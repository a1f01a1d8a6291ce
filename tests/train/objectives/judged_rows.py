"""Rows of random pairs and labelled answers for a tiny model, and the log-probabilities of their answers one by one."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_train.data.batches.answer_batches import PreferenceBatch, SharedPromptBatch, UnpairedBatch
from moe_train.data.batches.batch import StoredPiece
from moe_train.data.chat.example import SEGMENT_START
from tests.train.tiny_step import B, V

SEQ_LEN = 16


def piece(rng: np.random.Generator, answers: int, values: tuple[float, ...] = ()) -> StoredPiece:
    """One segment for each answer, of 2 ids of prompt and 2 or 3 of answer."""
    tokens, mask, numbers = [], [], []
    for number in range(1, answers + 1):
        size = int(rng.integers(4, 6))
        tokens.append(rng.integers(0, V, size))
        mask.append(np.arange(size) >= 2)
        numbers.append(np.full(size, number) + SEGMENT_START * (np.arange(size) == 0))
    return StoredPiece(np.concatenate(tokens), np.concatenate(mask), np.concatenate(numbers).astype(np.uint8), np.array(values))


def pair_rows(rows: int = B) -> tuple[PreferenceBatch, list[StoredPiece]]:
    """Rows with one or two pairs; the first row is empty."""
    rng = np.random.default_rng(1)
    batch = PreferenceBatch.empty(rows, SEQ_LEN)
    pieces = []
    for row in range(1, rows):
        row_pieces = [piece(rng, 2) for _ in range(1 + row % 2)]
        batch.fill_row(row, row_pieces)
        pieces += row_pieces
    return batch, pieces


def rows_of_both_layouts(rows: int = B) -> tuple[PreferenceBatch, SharedPromptBatch]:
    """The same pairs with a prompt for each answer and with one for both: prompts of 1 to 9 tokens, and answers of 1 to 6."""
    rng = np.random.default_rng(5)
    plain = PreferenceBatch.empty(rows, 64)
    shared = SharedPromptBatch.empty(rows, 40)
    for row in range(1, rows):
        pieces = [_pair_with_prompt(rng, int(rng.integers(1, 10))) for _ in range(1 + row % 2)]
        plain.fill_row(row, pieces)
        shared.fill_row(row, pieces)
    return plain, shared


def _pair_with_prompt(rng: np.random.Generator, num_prompt: int) -> StoredPiece:
    prompt = rng.integers(0, V, num_prompt)
    texts = [np.concatenate([prompt, rng.integers(0, V, int(rng.integers(1, 7)))]) for _ in range(2)]
    mask = np.concatenate([np.arange(len(text)) >= num_prompt for text in texts])
    answers = np.repeat([1, 2], [len(text) for text in texts])
    answers[[0, len(texts[0])]] += SEGMENT_START
    return StoredPiece(np.concatenate(texts), mask, answers, np.array([0.0, num_prompt - 1]))


def unpaired_rows(rows: int = B) -> tuple[UnpairedBatch, list[StoredPiece]]:
    """Rows with one or two labelled answers; the first row is empty."""
    rng = np.random.default_rng(3)
    batch = UnpairedBatch.empty(rows, SEQ_LEN)
    pieces = []
    for row in range(1, rows):
        row_pieces = []
        for k in range(1 + row % 2):
            own = piece(rng, 1, (float((row + k) % 3 == 0),))
            row_pieces.append(own._replace(mismatched=piece(rng, 1)))
        batch.fill_row(row, row_pieces)
        pieces += row_pieces
    return batch, pieces


def answer_sums(batch: Any, logprobs: Any, answer: int, row: int) -> Any:
    """Sum of an answer's log-probabilities, given those of all targets (B, T)."""
    return (logprobs[row] * ((batch.answer_ids[row] == answer) & batch.loss_mask[row])).sum()
