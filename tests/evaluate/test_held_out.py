"""Metrics of held-out data: sums over batches of any objective."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train.evaluate.held_out import evaluate_held_out
from moe_train.evaluate.loss import make_batch_sums
from moe_train.machine.mesh import put_batch
from moe_train.model.parameters import combine
from moe_train.train.objectives.custom import custom_objective
from moe_train.train.objectives.next_token import next_token
from moe_train.train.objectives.objective import Mean
from moe_train.train.token_logprobs import batch_logprobs
from tests.evaluate.two_batches import HALVES, LOADER
from tests.random_parameters import random_parameters
from tests.train.tiny_step import MESHES, MODEL, ONE, batch, plain_logprobs, structure_of


def test_next_token_is_the_mean_over_all_tokens() -> None:
    with jax.set_mesh(ONE):
        params = random_parameters(MODEL, scale=0.3)
        found = evaluate_held_out(make_batch_sums(structure_of(None), next_token()), params, {}, LOADER, ONE)
        plain = jax.jit(lambda params, batch: plain_logprobs(combine(structure_of(None), params), batch)[1])
        logprob = jax.device_get(plain(params, put_batch(batch(), ONE)))
        mask = batch().loss_mask
    assert found == {"loss": pytest.approx(-np.sum(logprob * mask) / mask.sum(), rel=1e-5), "loss_tokens": mask.sum()}
    assert isinstance(found["loss_tokens"], int)


def test_no_loss_bearing_token_has_no_loss() -> None:
    nothing = HALVES[0]._replace(loss_mask=HALVES[0].loss_mask & False)
    loader: Any = SimpleNamespace(batches=1, batch=lambda i: nothing)
    with jax.set_mesh(ONE):
        found = evaluate_held_out(make_batch_sums(structure_of(None), next_token()), random_parameters(MODEL), {}, loader, ONE)
    assert math.isnan(found["loss"]) and found["loss_tokens"] == 0


def test_metrics_that_an_objective_names() -> None:
    """Sums are added, means weighted, over the batches that are asked for."""

    def rows_and_length(model: Any, batch: Any, key: Any) -> tuple[Any, ...]:
        entropy = batch_logprobs(model, batch, key)[0].entropy
        rows = jnp.int32(batch.tokens.shape[0])
        return jnp.sum(entropy), rows, {"rows": rows, "tokens_per_row": Mean(jnp.sum(batch.loss_mask), rows)}

    mesh = MESHES["data, fsdp, tensor"]
    with jax.set_mesh(mesh):
        sums = make_batch_sums(structure_of(None), custom_objective(rows_and_length))
        params = random_parameters(MODEL)
        both, first = (evaluate_held_out(sums, params, {}, LOADER, mesh, batches) for batches in (None, 1))
    assert both["rows"] == both["weight"] == 16 and first["rows"] == 8
    assert both["tokens_per_row"] == batch().loss_mask.sum() / 16
    assert both["loss"] > 0 and set(both) == {"loss", "weight", "rows", "tokens_per_row"}
