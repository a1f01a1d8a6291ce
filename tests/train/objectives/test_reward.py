"""Bradley-Terry rewards of packed pairs against each answer alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_train import config
from moe_train.data.batches.batch import StoredPiece
from moe_train.data.batches.reward_batch import RewardBatch
from moe_train.data.chat.example import SEGMENT_START
from moe_train.machine.mesh import put_batch
from moe_train.model.parameters import combine
from moe_train.train.gradients import step_gradients
from moe_train.train.objectives.choose import objective_of
from moe_train.train.objectives.objective import ModelWeights
from moe_train.train.step_definition import StepDefinition
from tests.random_parameters import random_parameters
from tests.train.objectives.test_classification import structure_of
from tests.train.tiny_step import MESHES, MODEL, ONE, B, T, V

SECTION = config.Reward(name="reward", center_weight=0.05)
SCORING = MODEL.model_copy(update={"scores": SECTION.scores})
PAIRS = ((3, 2), (4, 3))
"""Tokens of the answers of each pair of a row."""


def pieces(row: int) -> list[StoredPiece]:
    rng = np.random.default_rng(row)
    made = []
    for sizes in PAIRS:
        answers = np.concatenate([np.full(size, number) for number, size in enumerate(sizes, start=1)]).astype(np.uint8)
        answers[[0, sizes[0]]] += SEGMENT_START
        tokens = rng.integers(0, V, sum(sizes)).astype(np.uint16)
        made.append(StoredPiece(tokens, np.ones(len(tokens), bool), answers, values=np.array([float(row % 3) / 2])))
    return made


def rows() -> RewardBatch:
    made = RewardBatch.empty(B, T)
    for row in range(B):
        made.fill_row(row, pieces(row))
    return made


def by_pair(weights: Any) -> jax.Array:
    model = combine(structure_of(SCORING), weights)
    total = jnp.float32(0)
    for place, (first, _) in enumerate(PAIRS):
        stacked = np.stack([pieces(row)[place].tokens.astype(np.int32) for row in range(B)])
        chosen, rejected = (model.logits(model(part)[0])[:, -1, 0] for part in (stacked[:, :first], stacked[:, first:]))
        margins = np.array([pieces(row)[place].values[0] for row in range(B)])  # type: ignore[index]
        total += jnp.sum(-jax.nn.log_sigmoid(chosen - rejected - margins) + 0.05 * (chosen + rejected) ** 2)
    return total / (B * len(PAIRS))


@pytest.mark.parametrize(("mesh", "microbatches"), [("one device", 1), ("data, fsdp, tensor", 2), ("fsdp, expert, context", 1)])
def test_packed_pairs_have_the_loss_of_each_answer_alone(mesh: str, microbatches: int) -> None:
    structure_of(SCORING)  # before the mesh is in force inside a program
    with jax.set_mesh(ONE):
        expected = jax.device_get(jax.jit(jax.value_and_grad(by_pair))(random_parameters(SCORING, scale=0.3)))
    definition = StepDefinition(structure_of(SCORING), objective_of(SECTION), optax.identity(), microbatches=microbatches)
    with jax.set_mesh(MESHES[mesh]):
        run = jax.jit(partial(step_gradients, definition, key=None))
        found = jax.device_get(
            run(random_parameters(SCORING, scale=0.3), ModelWeights({}, {}, {}), put_batch(rows(), MESHES[mesh]))
        )
    np.testing.assert_allclose(found.loss, expected[0], rtol=2e-5)
    assert found.weight == B * len(PAIRS)
    for path, gradient in expected[1].items():
        assert np.max(np.abs(found.gradients[path] - gradient)) <= 1e-4 * np.max(np.abs(gradient)), path
