"""Labelled answers: loss, gradients and z on every mesh equal a plain computation over all logits."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from moe_train import config
from moe_train.machine.mesh import put_batch
from moe_train.model.parameters import combine
from moe_train.train.objectives.unpaired_preference import unpaired_preference
from moe_train.train.state import partition, trained_in_full
from tests.random_parameters import random_parameters
from tests.train.objectives.judged_rows import unpaired_rows
from tests.train.tiny_step import LORA, MESHES, MODEL, ONE, check_equal, gradients, plain_logprobs, structure_of

KTO = config.UnpairedPreference(name="unpaired_preference", desirable_weight=1.5)


def plain_loss(model: Any, base: Any, batch: Any) -> tuple[Any, Any]:
    """(mean over labelled answers, z), with a forward pass over all segments at once."""
    every = batch._replace(segment_ids=batch.segment_ids + batch.mismatched_ids)
    _, logprobs = plain_logprobs(model, every)
    _, reference = plain_logprobs(base, every)
    ratios = jnp.where(batch.loss_mask, logprobs - reference, 0)
    by_answer = jnp.stack([jnp.sum(jnp.where(batch.answer_ids == k, ratios, 0), axis=1) for k in (1, 2, 3, 4)])
    exists = jnp.stack([jnp.any(batch.answer_ids == k, axis=1) for k in (1, 3)])
    good = jnp.stack([jnp.any((batch.answer_ids == k) & batch.good, axis=1) for k in (1, 3)])
    z = jax.lax.stop_gradient(jnp.maximum(0, jnp.sum(by_answer[1::2]) / jnp.sum(exists)))
    r = by_answer[::2]
    losses = jnp.where(good, 1.5 * (1 - jax.nn.sigmoid(0.1 * (r - z))), 1 - jax.nn.sigmoid(0.1 * (z - r)))
    return jnp.sum(exists * losses) / jnp.sum(exists), z


@cache
def expected() -> tuple[Any, Any]:
    with jax.set_mesh(ONE):
        learned, frozen = partition(random_parameters(MODEL, lora=LORA, scale=0.3), LORA)
        base = combine(structure_of(None), frozen, {path: x + 0.5 for path, x in trained_in_full(learned, LORA).items()})
        loss = lambda p, f, b, base: plain_loss(combine(structure_of(LORA), p, f), base, b)  # noqa: E731
        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        return jax.device_get(run(learned, frozen, put_batch(unpaired_rows()[0], ONE), base))


@pytest.mark.parametrize(
    ("mesh", "microbatches"),
    [
        pytest.param("one device", 1, marks=pytest.mark.slow),
        pytest.param("data, fsdp, tensor", 2, marks=pytest.mark.slow),
        ("fsdp, expert, context", 2),
    ],
)
def test_every_mesh_gives_the_loss_and_the_gradients_of_a_plain_computation(mesh: str, microbatches: int) -> None:
    batch, pieces = unpaired_rows()
    step = gradients(unpaired_preference(KTO), MESHES[mesh], microbatches, LORA, rows=batch)
    (value, z), wanted = expected()
    check_equal(step, (value, wanted))
    assert step.weight == len(pieces)
    metrics = {name: metric.sum / metric.weight for name, metric in step.terms.metrics.items()}
    assert metrics["kl"] == pytest.approx(z, rel=1e-4) and z > 0
    assert metrics["rewards/margins"] == pytest.approx(metrics["rewards/chosen"] - metrics["rewards/rejected"], rel=1e-4)
    assert step.terms.metrics["rewards/chosen"].weight == sum(piece.values[0] for piece in pieces)
    # Mismatched segments are neither routed nor counted when the loss is computed.
    assert step.terms.routers.chosen_E.sum() == 2 * MODEL.num_layers * (batch.segment_ids != 0).sum()
