"""Classification against a plain reference: softmax and binary cross-entropies at the last token of each packed text."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_train import config
from moe_train.data.batches.batch import StoredPiece
from moe_train.data.batches.classification_batch import classification_batch
from moe_train.machine.mesh import put_batch
from moe_train.model.parameters import combine, parameters
from moe_train.model.transformer import abstract_model
from moe_train.train.gradients import step_gradients
from moe_train.train.objectives.choose import objective_of
from moe_train.train.objectives.objective import ModelWeights
from moe_train.train.step_definition import StepDefinition
from tests.random_parameters import random_parameters
from tests.train.tiny_step import MESHES, MODEL, ONE, B, T, V

SECTION = config.Classification(
    name="classification",
    labels={"mood": config.LabelSet(names=("good", "bad", "none")), "topics": config.LabelSet(names=("a", "b"), several=True)},
)
SCORING = MODEL.model_copy(update={"scores": SECTION.scores})
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


@cache
def structure_of(model: config.Model) -> Any:
    compute = config.Compute(grouped_matmul="reference", attention="reference")
    with jax.set_mesh(ONE):
        return parameters(abstract_model(model, compute))[0]


def by_text(weights: Any) -> jax.Array:
    """The mean loss over texts that are each alone in a row."""
    model = combine(structure_of(SCORING), weights)
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


@pytest.mark.parametrize(("mesh", "microbatches"), [("one device", 1), ("data, fsdp, tensor", 2), ("fsdp, expert, context", 1)])
def test_packed_texts_have_the_loss_of_each_alone(mesh: str, microbatches: int) -> None:
    structure_of(SCORING)  # before the mesh is in force inside a program
    with jax.set_mesh(ONE):
        expected = jax.device_get(jax.jit(jax.value_and_grad(by_text))(random_parameters(SCORING, scale=0.3)))
    definition = StepDefinition(structure_of(SCORING), objective_of(SECTION), optax.identity(), microbatches=microbatches)
    with jax.set_mesh(MESHES[mesh]):
        run = jax.jit(partial(step_gradients, definition, key=None))
        found = jax.device_get(
            run(random_parameters(SCORING, scale=0.3), ModelWeights({}, {}, {}), put_batch(rows(), MESHES[mesh]))
        )
    np.testing.assert_allclose(found.loss, expected[0], rtol=2e-5)
    assert found.weight == B * len(LENGTHS)
    for path, gradient in expected[1].items():
        assert np.max(np.abs(found.gradients[path] - gradient)) <= 1e-4 * np.max(np.abs(gradient)), path
    known = found.terms.metrics["accuracy/mood"].weight
    assert 0 < known < found.weight == found.terms.metrics["accuracy/topics"].weight
