"""A step of an objective that trains a head, against a plain loss over texts that are each alone in a row."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import optax

from moe_train import config
from moe_train.machine.mesh import put_batch
from moe_train.model.parameters import combine, parameters
from moe_train.model.transformer import Transformer, abstract_model
from moe_train.train.gradients import StepGradients, step_gradients
from moe_train.train.objectives.choose import objective_of
from moe_train.train.objectives.objective import ModelWeights
from moe_train.train.step_definition import StepDefinition
from tests.random_parameters import random_parameters
from tests.train.tiny_step import MESHES, MODEL, ONE

MESHES_AND_MICROBATCHES = [("one device", 1), ("data, fsdp, tensor", 2), ("fsdp, expert, context", 1)]


@cache
def structure_of(model: config.Model) -> Any:
    compute = config.Compute(grouped_matmul="reference", attention="reference")
    with jax.set_mesh(ONE):
        return parameters(abstract_model(model, compute))[0]


def checked_step(
    section: config.HeadObjective, rows: Any, plain_loss: Callable[[Transformer], Any], mesh: str, microbatches: int
) -> StepGradients:
    """The step on a mesh, whose loss and gradients are those of `plain_loss` on one device."""
    scoring = MODEL.model_copy(update={"scores": section.scores})
    structure = structure_of(scoring)  # before the mesh is in force inside a program
    with jax.set_mesh(ONE):
        plain = jax.jit(jax.value_and_grad(lambda weights: plain_loss(combine(structure, weights))))
        loss, gradients = jax.device_get(plain(random_parameters(scoring, scale=0.3)))
    definition = StepDefinition(structure, objective_of(section), optax.identity(), microbatches=microbatches)
    with jax.set_mesh(MESHES[mesh]):
        run = jax.jit(partial(step_gradients, definition, key=None))
        step = run(random_parameters(scoring, scale=0.3), ModelWeights({}, {}, {}), put_batch(rows, MESHES[mesh]))
        step = jax.device_get(step)
    np.testing.assert_allclose(step.loss, loss, rtol=2e-5)
    for path, gradient in gradients.items():
        assert np.max(np.abs(step.gradients[path] - gradient)) <= 1e-4 * np.max(np.abs(gradient)), path
    return step
