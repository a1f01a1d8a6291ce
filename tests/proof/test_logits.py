"""Logits layer by layer against the model's own."""

from __future__ import annotations

import jax
import numpy as np

from moe_train import config
from moe_train.machine.mesh import put_batch
from moe_train.model.parameters import combine
from moe_train.proof import logits as proof_logits
from tests.proof.exported import LORA, MODEL
from tests.random_parameters import random_parameters
from tests.tiny import ONE


def test_logits_are_the_models_own(weights: dict[str, jax.Array]) -> None:
    with jax.set_mesh(ONE):
        structure, _ = proof_logits.structure_and_shapes(MODEL, LORA, "float32")
        prompts = proof_logits.fixed_prompts(MODEL, None)
        found = proof_logits.probe_logits(structure, weights, prompts)
        model = combine(structure, weights)
        segments = np.ones(prompts.tokens_PT.shape, np.int32)
        hidden, _ = model(*put_batch(tuple(x.astype(np.int32) for x in (*prompts, segments)), ONE))
        logits = np.asarray(model.logits(hidden))
    assert np.abs(found.logits_PTV - logits).max() / np.abs(logits).max() < 1e-5
    assert found.routers_LPTE is not None and found.routers_LPTE.shape == (2, 4, 16, 4)


def test_logits_of_several_stacks() -> None:
    dense_first = MODEL.model_copy(
        update={"num_layers": 3, "ffn": MODEL.ffn.model_copy(update={"dense_layers": config.DenseLayers(count=1, ffn_dim=24)})}
    )
    with jax.set_mesh(ONE):
        structure, _ = proof_logits.structure_and_shapes(dense_first, None, "float32")
        prompts, weights = proof_logits.fixed_prompts(dense_first, None), random_parameters(dense_first)
        found = proof_logits.probe_logits(structure, weights, prompts)
        model = combine(structure, weights)
        segments = np.ones(prompts.tokens_PT.shape, np.int32)
        hidden, _ = model(*put_batch(tuple(x.astype(np.int32) for x in (*prompts, segments)), ONE))
        logits = np.asarray(model.logits(hidden))
    assert np.abs(found.logits_PTV - logits).max() / np.abs(logits).max() < 1e-5
    assert found.routers_LPTE is not None and found.routers_LPTE.shape == (2, 4, 16, 4)
