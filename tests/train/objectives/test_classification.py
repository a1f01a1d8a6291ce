"""Classification against a plain reference: softmax and binary cross-entropies at the last token of each packed text."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_train import config
from moe_train.data.batches.batch import StoredPiece
from moe_train.data.batches.classification_batch import classification_batch
from moe_train.model.transformer import Transformer
from tests.train.objectives.scored_step import MESHES_AND_MICROBATCHES, checked_step
from tests.train.tiny_step import B, T, V

SECTION = config.Classification(
    name="classification",
    labels={"mood": config.LabelSet(names=("good", "bad", "none")), "topics": config.LabelSet(names=("a", "b"), several=True)},
)
LENGTHS = (5, 4, 2)
"""Tokens of the texts of each row."""


def pieces(row: int) -> list[StoredPiece]:
    rng = np.random.default_rng(row)
    made = []
    for length in LENGTHS:
        labels = np.zeros(5)
        labels[rng.integers(3)] = 1
        labels[3:] = rng.integers(0, 2, 2)
        if rng.random() < 0.3:
            labels[:3] = np.nan
        mask = np.arange(length) == length - 1
        made.append(StoredPiece(rng.integers(0, V, length).astype(np.uint16), mask, values=labels))
    return made


def rows() -> Any:
    made = classification_batch(SECTION.targets).empty(B, T)
    for row in range(B):
        made.fill_row(row, pieces(row))
    return made


def by_text(model: Transformer) -> jax.Array:
    """The mean loss over texts that are each alone in a row."""
    total = jnp.float32(0)
    for place, length in enumerate(LENGTHS):
        texts = [pieces(row)[place] for row in range(B)]
        hidden, _ = model(np.stack([text.tokens.astype(np.int32) for text in texts]))
        scores = model.logits(hidden)[:, -1]
        labels = np.stack([text.values for text in texts])  # type: ignore[misc]
        mood = optax.softmax_cross_entropy(scores[:, :3], np.nan_to_num(labels[:, :3]))
        topics = optax.sigmoid_binary_cross_entropy(scores[:, 3:], labels[:, 3:])
        total += jnp.sum(jnp.where(np.isnan(labels[:, 0]), 0, mood)) + jnp.sum(jnp.mean(topics, axis=1))
        assert length == hidden.shape[1]
    return total / (B * len(LENGTHS))


@pytest.mark.parametrize(("mesh", "microbatches"), MESHES_AND_MICROBATCHES)
def test_packed_texts_have_the_loss_of_each_alone(mesh: str, microbatches: int) -> None:
    step = checked_step(SECTION, rows(), by_text, mesh, microbatches)
    known = step.terms.metrics["accuracy/mood"].weight
    assert 0 < known < step.weight == B * len(LENGTHS) == step.terms.metrics["accuracy/topics"].weight
