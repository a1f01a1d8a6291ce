"""Logits layer by layer against the model's own, and how two sets of them are compared."""

from __future__ import annotations

import jax
import numpy as np

from moe_train import config
from moe_train.machine.mesh import put_batch
from moe_train.model.parameters import combine
from moe_train.proof import logits as answers
from tests.proof.exported import LORA, MODEL
from tests.random_parameters import random_parameters
from tests.tiny import ONE


def test_near_ties_are_counted_and_what_follows_them_is_left_out() -> None:
    T = 6
    prompts = answers.Prompts(np.zeros((1, T), int), np.arange(T)[None])
    routers = np.tile(np.array([4.0, 3.0, 1.0, 0.0]), (2, 1, T, 1))
    logits = np.random.default_rng(0).normal(size=(1, T, 8)).astype(np.float32)
    wanted = answers.reference(answers.Answers(logits, routers), MODEL)
    assert answers.compare(answers.Answers(logits, routers), wanted, prompts, MODEL, 1e-3).wrong == 0

    tie = routers.copy()
    tie[0, 0, 3] = [4.0, 3.0 - 1e-5, 3.0, 0.0]  # experts 0 and 2
    tie[1, 0, 4] = [0.0, 1.0, 2.0, 3.0]  # comes after it: whatever it chose is not compared
    moved = logits.copy()
    moved[0, 3:] += 100
    found = answers.compare(answers.Answers(moved, tie), wanted, prompts, MODEL, 1e-3)
    assert (found.near_ties, found.wrong, found.positions, found.excluded) == (1, 0, 3, 3)
    assert found.logits == 0 and found.choices == T + 3

    other = routers.copy()
    other[1, 0, 2] = [4.0, 1.0, 3.0, 0.0]
    assert answers.compare(answers.Answers(logits, other), wanted, prompts, MODEL, 1e-3).first_wrong == (1, 0, 2)


def test_the_answers_are_the_models_own(weights: dict[str, jax.Array]) -> None:
    with jax.set_mesh(ONE):
        structure, _ = answers.structure_and_shapes(MODEL, LORA, "float32")
        prompts = answers.fixed_prompts(MODEL, None)
        found = answers.answers(structure, weights, prompts)
        model = combine(structure, weights)
        segments = np.ones(prompts.tokens_PT.shape, np.int32)
        hidden, _ = model(*put_batch(tuple(x.astype(np.int32) for x in (*prompts, segments)), ONE))
        logits = np.asarray(model.logits(hidden))
    assert np.abs(found.logits_PTV - logits).max() / np.abs(logits).max() < 1e-5
    assert found.routers_LPTE is not None and found.routers_LPTE.shape == (2, 4, 16, 4)


def test_the_answers_of_several_stacks() -> None:
    dense_first = MODEL.model_copy(
        update={"num_layers": 3, "ffn": MODEL.ffn.model_copy(update={"dense_layers": config.DenseLayers(count=1, ffn_dim=24)})}
    )
    with jax.set_mesh(ONE):
        structure, _ = answers.structure_and_shapes(dense_first, None, "float32")
        prompts, weights = answers.fixed_prompts(dense_first, None), random_parameters(dense_first)
        found = answers.answers(structure, weights, prompts)
        model = combine(structure, weights)
        segments = np.ones(prompts.tokens_PT.shape, np.int32)
        hidden, _ = model(*put_batch(tuple(x.astype(np.int32) for x in (*prompts, segments)), ONE))
        logits = np.asarray(model.logits(hidden))
    assert np.abs(found.logits_PTV - logits).max() / np.abs(logits).max() < 1e-5
    assert found.routers_LPTE is not None and found.routers_LPTE.shape == (2, 4, 16, 4)
