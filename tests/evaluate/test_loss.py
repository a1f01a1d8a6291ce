"""An objective with a reference model on held-out data."""

from __future__ import annotations

import jax

from moe_train.evaluate.held_out import evaluate_held_out
from moe_train.evaluate.loss import make_batch_sums
from tests.evaluate.two_batches import LOADER
from tests.random_parameters import random_parameters
from tests.train.tiny_objectives import divergence
from tests.train.tiny_step import LORA, MODEL, ONE, structure_of


def test_a_reference_model_takes_the_base_weights() -> None:
    with jax.set_mesh(ONE):
        params = random_parameters(MODEL, lora=LORA, scale=0.3)
        frozen = {path: x for path, x in params.items() if "lora_" not in path and path != "final_norm.scale"}
        learned = {path: x for path, x in params.items() if path not in frozen}
        without_delta = {path: 0 * x if path.endswith("lora_b") else x for path, x in learned.items()}
        base = {"final_norm.scale": learned["final_norm.scale"]}
        sums = make_batch_sums(structure_of(LORA), divergence(), base)
        moved, same = (evaluate_held_out(sums, params, frozen, LOADER, ONE)["loss"] for params in (learned, without_delta))
    assert moved > 1e-4 and same == 0
