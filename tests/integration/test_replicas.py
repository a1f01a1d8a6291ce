"""Replicas over the slow network (the axis `data`): each sums the gradients of its own microbatches, and they meet once."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.data.batches.batch import Batch
from moe_train.machine.mesh import put_batch
from moe_train.plan import hlo
from moe_train.plan.replica_groups import axes_of
from moe_train.train.objectives.next_token import next_token
from moe_train.train.step import train_step
from moe_train.train.step_definition import StepDefinition
from tests.meshes import mesh_of
from tests.train.biased_step import LORA, LOSS, ONE, OPTIMIZER, POISON, V, close, started, step

T = 12
LORA_WITH_DROPOUT = LORA.model_copy(update={"dropout": 0.4})
MESHES = {
    "data, expert, context": config.Mesh(data=2, expert=2, context=2),
    "data, fsdp, tensor": config.Mesh(data=2, fsdp=2, tensor=2),
}


def batch(rows: int) -> Batch:
    """Two segments a row, which end elsewhere in each; loss on more tokens of later rows."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, POISON, (rows, T)).astype(np.int32)
    cuts = 2 + np.arange(rows)[:, None] % 7
    segments = (1 + (np.arange(T) >= cuts)).astype(np.int32)
    segments[::3, T - 2 :] = 0
    positions = np.arange(T) - np.where(np.arange(T) >= cuts, cuts, 0)
    mask = (np.arange(T) < np.arange(rows)[:, None]) & (segments > 0)
    return Batch(tokens, np.roll(tokens, -1, 1), mask, segments, positions.astype(np.int32))


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_replicas_take_the_step_of_one_device(sizes: config.Mesh) -> None:
    (after, metrics), (wanted, wanted_metrics) = (step(batch(8), mesh, 2) for mesh in (mesh_of(sizes), ONE))
    close(metrics, wanted_metrics)
    finite = lambda state: {**state.trainable, "embed.weight": state.trainable["embed.weight"][:POISON]}  # noqa: E731
    close(finite(after), finite(wanted))


@pytest.mark.slow
def test_replicas_drop_what_one_device_drops() -> None:
    found = []
    for mesh in (mesh_of(MESHES["data, expert, context"]), ONE):
        with jax.set_mesh(mesh):
            structure, state = started(mesh, LORA_WITH_DROPOUT)
            definition = StepDefinition(structure, next_token(), OPTIMIZER, LOSS, 2, dropout_seed=3)
            run = jax.jit(partial(train_step, definition))
            found.append(jax.device_get(run(state, put_batch(batch(8), mesh))))
    (after, metrics), (wanted, wanted_metrics) = found
    close(metrics, wanted_metrics)
    close(after.trainable, wanted.trainable)


def test_gradients_cross_the_slow_network_once() -> None:
    """As many bytes as the gradients have on a device, for four microbatches; besides these only sums of the routers and
    the loss."""
    microbatches = 4
    mesh = mesh_of(config.Mesh(data=2, fsdp=4))
    with jax.set_mesh(mesh):
        structure, state = started(mesh)
        program = jax.jit(partial(train_step, StepDefinition(structure, next_token(), OPTIMIZER, LOSS, microbatches)))
        text = program.lower(state, put_batch(batch(8 * microbatches), mesh)).compile().as_text()
    gradients = sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in state.trainable.values())
    bytes_by_axes: Counter[tuple[str, ...]] = Counter()
    for c, times in hlo.count_program(text).collectives.items():
        axes = axes_of(c.groups, mesh.shape)
        if "data" in axes:
            bytes_by_axes[axes] += times * c.bytes
            assert times == 1 or c.bytes < 4 * 2 * V, f"{c} runs {times} times"
    received = 2 * (2 - 1) / 2 * gradients  # an all-reduce of two
    assert received <= bytes_by_axes["data",] < 1.02 * received + microbatches * 2 * 500
    assert sum(bytes_by_axes.values()) - bytes_by_axes["data",] < 200
