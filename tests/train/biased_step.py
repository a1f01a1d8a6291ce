"""A tiny sparse model whose routers have biases, a batch for it, and a step from its first state."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from moe_train import config
from moe_train.data.batches.batch import Batch
from moe_train.machine.mesh import put_batch
from moe_train.model.parameters import parameters
from moe_train.model.transformer import abstract_model
from moe_train.train.objectives.next_token import next_token
from moe_train.train.state import TrainState, create_state
from moe_train.train.step import StepMetrics, train_step
from moe_train.train.step_definition import StepDefinition
from tests.meshes import mesh_of

B, T, V = 8, 10, 24
BIASED = config.SoftmaxRouter(name="softmax", bias=True)
MIXTRAL = config.Model(
    family="mixtral",
    vocab_size=V,
    model_dim=8,
    num_layers=2,
    attention=config.GroupedQueryAttention(num_heads=2, num_kv_heads=2, head_dim=4),
    ffn=config.MoeFfn(name="moe", ffn_dim=12, num_experts=4, experts_per_token=2, router=BIASED),
)
LORA = config.Lora(targets=(config.LoraTarget(modules=("attention.q_proj", "ffn.up_proj"), rank=2, alpha=4.0),))
LOSS = config.Loss(load_balance_loss_coef=0.5, router_z_loss_coef=0.1, bias_update_rate=0.01)
ONE = mesh_of(config.Mesh())
FOUR = mesh_of(config.Mesh(fsdp=2, expert=2))
OPTIMIZER = optax.adamw(1e-2, weight_decay=0.1)
POISON = V - 1
"""A token whose embedding is not a number; no batch has it unless asked for."""


def batch(*, poisoned: bool = False, loss: bool = True) -> Batch:
    """Row r has loss on about r of its tokens, so that microbatches differ; row 0 on none."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, POISON, (B, T)).astype(np.int32)
    if poisoned:
        tokens[3, 4] = POISON
    mask = (np.arange(T) < np.arange(B)[:, None]) & loss
    segments = np.ones((B, T), np.int32)
    segments[:, T - 2 :] = 0
    return Batch(tokens, np.roll(tokens, -1, 1), mask & (segments > 0), segments, np.tile(np.arange(T, dtype=np.int32), (B, 1)))


@cache
def started(mesh: Mesh, lora: config.Lora | None = None) -> tuple[Any, TrainState]:
    with jax.set_mesh(mesh):
        structure, like = parameters(abstract_model(MIXTRAL, config.Compute(grouped_matmul="reference"), lora))
        rng, params = np.random.default_rng(1), {}
        for path, x in like.items():
            values = rng.normal(path.endswith(".scale"), 0.3, x.shape).astype(x.dtype)
            if path == "embed.weight":
                values[POISON] = np.nan
            params[path] = jax.device_put(values, NamedSharding(mesh, x.sharding.spec))
        return structure, jax.jit(lambda p: create_state(p, OPTIMIZER, lora))(params)


def definition(mesh: Mesh, microbatches: int, lora: config.Lora | None = None) -> StepDefinition:
    return StepDefinition(started(mesh, lora)[0], next_token(), OPTIMIZER, LOSS, microbatches)


@cache
def compiled(mesh: Mesh, microbatches: int, lora: config.Lora | None = None) -> Any:
    return jax.jit(partial(train_step, definition(mesh, microbatches, lora)))


def step(batch: Batch, mesh: Mesh = ONE, microbatches: int = 1, lora: config.Lora | None = None) -> tuple[TrainState, StepMetrics]:
    with jax.set_mesh(mesh):
        return jax.device_get(compiled(mesh, microbatches, lora)(started(mesh, lora)[1], put_batch(batch, mesh)))


def close(a: Any, b: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), a, b)
