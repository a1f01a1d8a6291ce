"""A person's own loss function, on every mesh, with microbatches, in full training and beside adapters."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from moe_train.machine.mesh import put_batch
from moe_train.model.paths import ParameterPath
from moe_train.plan import hlo
from moe_train.train.gradients import step_gradients
from moe_train.train.objectives.custom import custom_objective
from moe_train.train.objectives.next_token import next_token
from moe_train.train.objectives.objective import Mean, ModelWeights
from moe_train.train.step_definition import StepDefinition
from tests.random_parameters import random_parameters
from tests.train.tiny_objectives import COEFS, by_hand
from tests.train.tiny_step import (
    EVERY_MESH,
    LORA,
    MESHES,
    MODEL,
    ONE,
    V,
    batch,
    check_equal,
    gradients,
    plain_gradients,
    plain_logprobs,
    structure_of,
)


def focal(model: Any, batch: Any, key: Any) -> tuple[Any, Any, Any]:
    """Focal cross-entropy over the sum of its own weights, and a z-loss: the weight depends on the model."""
    hidden, _ = model(batch.tokens, batch.positions, batch.segment_ids, key)
    logits = model.logits(hidden)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    logprob = jnp.sum(jnp.where(batch.targets[..., None] == jnp.arange(V), logits, 0), axis=-1) - normaliser
    weights = jnp.square(1 - jnp.exp(logprob)) * batch.loss_mask
    total = jnp.sum(-weights * logprob + 0.1 * jnp.square(normaliser) * batch.loss_mask)
    return total, jnp.sum(weights), {"confidence": Mean(jnp.sum(jnp.exp(logprob) * batch.loss_mask), jnp.sum(batch.loss_mask))}


def plain_focal(model: Any, _: Any, batch: Any) -> jax.Array:
    hidden, _ = model(batch.tokens, batch.positions, batch.segment_ids)
    logits = model.logits(hidden)
    at_target = jnp.where(batch.targets[..., None] == jnp.arange(V), jax.nn.softmax(logits), 0)
    confidence = jnp.sum(at_target, axis=-1)
    cross_entropy = -jnp.log(confidence)
    weights = jnp.where(batch.loss_mask, (1 - confidence) ** 2, 0)
    z_loss = 0.1 * jnp.where(batch.loss_mask, jnp.log(jnp.sum(jnp.exp(logits), axis=-1)) ** 2, 0)
    return jnp.sum(weights * cross_entropy + z_loss) / jax.lax.stop_gradient(jnp.sum(weights))


@pytest.mark.parametrize(("mesh", "microbatches"), EVERY_MESH)
def test_full_training_equals_plain_gradients(mesh: str, microbatches: int) -> None:
    check_equal(gradients(custom_objective(focal), MESHES[mesh], microbatches), plain_gradients(plain_focal))


@pytest.mark.parametrize(("mesh", "microbatches"), [("one device", 1), ("data, fsdp, tensor", 2), ("fsdp, expert, context", 2)])
def test_adapters_equal_plain_gradients(mesh: str, microbatches: int) -> None:
    found = gradients(custom_objective(focal), MESHES[mesh], microbatches, LORA)
    assert sum(ParameterPath.parse(path).is_adapter for path in found.gradients) == 6
    check_equal(found, plain_gradients(plain_focal, LORA))


def test_a_mean_is_of_the_whole_step() -> None:
    def mean_confidence(model: Any, _: Any, batch: Any) -> jax.Array:
        return jnp.sum(jnp.exp(plain_logprobs(model, batch)[1]) * batch.loss_mask) / jnp.sum(batch.loss_mask)

    wanted = plain_gradients(mean_confidence)
    confidence = gradients(custom_objective(focal), MESHES["data, fsdp, tensor"], 2).terms.metrics["confidence"]
    assert confidence.sum / confidence.weight == pytest.approx(wanted[0], rel=1e-5)


@pytest.mark.slow
def test_a_weight_of_the_batch_alone_costs_no_forward_pass() -> None:
    def flops(objective: Any) -> float:
        definition = StepDefinition(structure_of(None), objective, optax.identity(), microbatches=2)
        with jax.set_mesh(ONE):
            params = random_parameters(MODEL)
            run = jax.jit(partial(step_gradients, definition, key=None))
            text = run.lower(params, ModelWeights({}, {}, {}), put_batch(batch(), ONE)).compile().as_text()
        assert text is not None
        return hlo.count_program(text).flops

    once = flops(replace(custom_objective(by_hand), weight=next_token().weight, first_pass=None))
    assert flops(custom_objective(by_hand)) == once < flops(custom_objective(focal))


def test_balanced_routers_need_the_routers_statistics() -> None:
    definition = StepDefinition(structure_of(None), custom_objective(focal), optax.identity(), COEFS)
    with (
        jax.set_mesh(ONE),
        pytest.raises(ValueError, match=r"'load_balance_loss_coef': 0.5.*returns no router statistics; return those of model"),
    ):
        jax.eval_shape(
            partial(step_gradients, definition, key=None),
            random_parameters(MODEL),
            ModelWeights({}, {}, {}),
            put_batch(batch(), ONE),
        )
