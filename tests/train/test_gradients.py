"""The mechanism that objectives stand in: the gradient-free pass over a whole step, and the reference model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train import config
from moe_train.data.batches.batch import Batch
from moe_train.model.parameters import Parameters, parameters
from moe_train.model.transformer import init_model
from moe_train.train.gradients import StepGradients
from moe_train.train.objectives.next_token import next_token
from moe_train.train.objectives.objective import Mean, Objective, ObjectiveInputs, Terms
from moe_train.train.token_logprobs import batch_logprobs
from tests.train.tiny_objectives import divergence
from tests.train.tiny_step import (
    EVERY_MESH,
    LORA,
    MESHES,
    MODEL,
    ONE,
    B,
    T,
    batch,
    check_equal,
    gradients,
    plain_gradients,
    plain_logprobs,
)


def step_baseline() -> Objective:
    """Sum of (log-probability - half of its mean over the whole step)^2; the mean is a constant."""

    def first_pass(inputs: ObjectiveInputs) -> Any:
        mask = inputs.batch.loss_mask
        outputs, _ = batch_logprobs(inputs.model, inputs.batch)
        return {"logprob": jnp.sum(outputs.logprob * mask), "tokens": jnp.sum(mask)}

    def loss(inputs: ObjectiveInputs, of_step: Any) -> Terms:
        outputs, routers = batch_logprobs(inputs.model, inputs.batch)
        baseline = of_step["logprob"] / of_step["tokens"]
        squares = jnp.square(outputs.logprob - baseline / 2) * inputs.batch.loss_mask
        return Terms(jnp.sum(squares), {"baseline": Mean(of_step["logprob"], of_step["tokens"])}, routers)

    return Objective(Batch, next_token().weight, loss, "squares", "tokens", first_pass)


def plain_baseline(model: Any, _: Any, batch: Any) -> jax.Array:
    logprob = plain_logprobs(model, batch)[1]
    tokens = jnp.sum(batch.loss_mask)
    baseline = jax.lax.stop_gradient(jnp.sum(logprob * batch.loss_mask) / tokens)
    return jnp.sum(jnp.square(logprob - baseline / 2) * batch.loss_mask) / tokens


@pytest.mark.parametrize(("mesh", "microbatches"), EVERY_MESH)
def test_a_pass_over_the_whole_step_comes_before_the_first_gradient(mesh: str, microbatches: int) -> None:
    check_equal(gradients(step_baseline(), MESHES[mesh], microbatches), plain_gradients(plain_baseline))


def plain_divergence(model: Any, base: Any, batch: Any) -> jax.Array:
    difference = plain_logprobs(base, batch)[1] - plain_logprobs(model, batch)[1]
    return jnp.sum((jnp.exp(difference) - difference - 1) * batch.loss_mask) / jnp.sum(batch.loss_mask)


@pytest.mark.parametrize(("mesh", "microbatches"), EVERY_MESH)
def test_the_reference_is_the_model_without_its_adapters(mesh: str, microbatches: int) -> None:
    """And with the base's own weights of what is trained in full beside them."""
    found, wanted = gradients(divergence(), MESHES[mesh], microbatches, LORA), plain_gradients(plain_divergence, LORA)
    assert "final_norm.scale" in found.gradients and found.loss > 0.01
    check_equal(found, wanted, 5e-5)


def fresh() -> Parameters:
    """Weights at the start of a run: the adapters change nothing yet."""
    return parameters(jax.jit(lambda: init_model(0, MODEL.model_copy(update={"init_stddev": 0.3}), config.Compute(), LORA))())[1]


@pytest.mark.parametrize(("mesh", "microbatches"), [("one device", 1), ("one device", 2), ("data, fsdp, tensor", 2)])
def test_the_divergence_from_the_reference_starts_at_zero(mesh: str, microbatches: int) -> None:
    found = gradients(divergence(), MESHES[mesh], microbatches, LORA, make=fresh)
    # Zero but for rounding: some processors sum the products of the two passes in another order.
    assert abs(found.loss) < 1e-12 and abs(found.terms.metrics["difference"]) < 1e-5
    for gradient in found.gradients.values():
        np.testing.assert_allclose(gradient, 0, atol=1e-7)


def test_full_training_has_no_reference_in_memory() -> None:
    seen = []

    def loss(inputs: ObjectiveInputs, of_step: Any) -> Terms:
        seen.append(inputs.reference)
        return next_token().loss(inputs, of_step)

    gradients(replace(next_token(), loss=loss, uses_reference=True), ONE)
    assert seen == [None]


def unevenly_padded() -> Batch:
    """Rows of 1 to 16 microbatch residues keep very different numbers of tokens."""
    whole = batch()
    lengths = np.where(np.arange(B) % 4 == 0, 2, T - np.arange(B) % 4)
    valid = np.arange(T) < lengths[:, None]
    return whole._replace(segment_ids=np.where(valid, whole.segment_ids, 0), loss_mask=whole.loss_mask & valid)


ROUTERS = {"load_balance_loss_coef": 1.0, "router_z_loss_coef": 1.0}


@cache
def large_batch() -> StepGradients:
    """The whole step as one batch on one device, where both kinds of balance are the same."""
    return gradients(next_token(), ONE, 1, router_loss=config.Loss(**ROUTERS), rows=unevenly_padded())


@pytest.mark.parametrize(
    "mesh", ["one device", "data, fsdp, tensor", pytest.param("fsdp, expert, context", marks=pytest.mark.slow)]
)
def test_the_balance_loss_over_the_step_is_that_of_one_large_batch(mesh: str) -> None:
    over_step = config.Loss(**ROUTERS, balance_over="step")
    found = gradients(next_token(), MESHES[mesh], 2, router_loss=over_step, rows=unevenly_padded())
    large = large_batch()
    check_equal(found, (large.loss, large.gradients))
    for field in ("load_balance_loss", "router_z_loss", "entropy", "mean_probability_E"):
        np.testing.assert_allclose(getattr(found.terms.routers, field), getattr(large.terms.routers, field), rtol=2e-5)


def test_the_balance_loss_of_microbatches_is_weighted_by_their_tokens() -> None:
    """By hand from the statistics of each microbatch as a batch of its own."""
    of_microbatches = config.Loss(**ROUTERS)
    found = gradients(next_token(), ONE, 2, router_loss=of_microbatches, rows=unevenly_padded())
    large = large_batch()
    halves = [jax.tree.map(lambda x, j=j: np.repeat(x[j::2], 2, axis=0), unevenly_padded()) for j in range(2)]
    parts = [gradients(next_token(), ONE, 1, rows=half).terms.routers for half in halves]
    tokens = np.array([np.sum(half.segment_ids != 0) for half in halves])
    assert tokens[0] < 0.7 * tokens[1]
    balance = sum(part.load_balance_loss * share for part, share in zip(parts, tokens / tokens.sum(), strict=True))
    np.testing.assert_allclose(found.terms.routers.load_balance_loss, balance, rtol=1e-5)
    np.testing.assert_allclose(found.terms.routers.router_z_loss, large.terms.routers.router_z_loss, rtol=1e-5)
    cross_entropy = found.terms.sum / found.weight
    np.testing.assert_allclose(found.loss, cross_entropy + np.sum(balance) + np.sum(large.terms.routers.router_z_loss), rtol=1e-5)
    assert abs(found.loss - large.loss) > 1e-3
