"""Bradley-Terry rewards of packed pairs against each answer alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train import config
from moe_train.data.batches.batch import StoredPiece
from moe_train.data.batches.reward_batch import RewardBatch
from moe_train.data.chat.example import SEGMENT_START
from moe_train.model.transformer import Transformer
from tests.train.objectives.scored_step import MESHES_AND_MICROBATCHES, checked_step
from tests.train.tiny_step import B, T, V

SECTION = config.Reward(name="reward", center_weight=0.05)
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


def by_pair(model: Transformer) -> jax.Array:
    total = jnp.float32(0)
    for place, (first, _) in enumerate(PAIRS):
        stacked = np.stack([pieces(row)[place].tokens.astype(np.int32) for row in range(B)])
        chosen, rejected = (model.logits(model(part)[0])[:, -1, 0] for part in (stacked[:, :first], stacked[:, first:]))
        margins = np.array([pieces(row)[place].values[0] for row in range(B)])  # type: ignore[index]
        total += jnp.sum(-jax.nn.log_sigmoid(chosen - rejected - margins) + 0.05 * (chosen + rejected) ** 2)
    return total / (B * len(PAIRS))


@pytest.mark.parametrize(("mesh", "microbatches"), MESHES_AND_MICROBATCHES)
def test_packed_pairs_have_the_loss_of_each_answer_alone(mesh: str, microbatches: int) -> None:
    step = checked_step(SECTION, rows(), by_pair, mesh, microbatches)
    assert step.weight == B * len(PAIRS)
