"""A tiny sparse model, a batch and meshes; the step's gradients of any objective on them, and plain ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from moe_train import config
from moe_train.data.batches.batch import Batch
from moe_train.machine.mesh import put_batch
from moe_train.model.parameters import Parameters, combine, parameters, with_expert_ids
from moe_train.model.transformer import Transformer, abstract_model
from moe_train.train.gradients import StepGradients, step_gradients
from moe_train.train.objectives.objective import ModelWeights, Objective
from moe_train.train.state import partition, trained_in_full
from moe_train.train.step_definition import StepDefinition
from tests.meshes import mesh_of
from tests.random_parameters import random_parameters

B, T, V = 16, 12, 32
MODEL = config.Model(
    family="mixtral",
    vocab_size=V,
    model_dim=8,
    num_layers=2,
    attention=config.GroupedQueryAttention(num_heads=2, num_kv_heads=2, head_dim=4),
    ffn=config.MoeFfn(name="moe", ffn_dim=12, num_experts=4, experts_per_token=2),
)
LORA = config.Lora(
    targets=(config.LoraTarget(modules=("attention.q_proj", "ffn.up_proj", "head"), rank=2, alpha=4.0),), train=("final_norm",)
)
ONE = mesh_of(config.Mesh())
MESHES = {
    "one device": ONE,
    "data, fsdp, tensor": mesh_of(config.Mesh(data=2, fsdp=2, tensor=2)),
    "fsdp, expert, context": mesh_of(config.Mesh(fsdp=2, expert=2, context=2)),
}
EVERY_MESH = [(mesh, 2) for mesh in MESHES] + [("one device", 1), ("data, fsdp, tensor", 1)]
"""(mesh, microbatches)."""


def batch() -> Batch:
    """Two segments and some padding in each row; row r bears loss on about r of its tokens, so that microbatches differ."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    cut = 2 + np.arange(B)[:, None] % 7
    place = np.arange(T)
    segments = np.where(place < T - 2, 1 + (place >= cut), 0).astype(np.int32)
    positions = (place - np.where(place >= cut, cut, 0)).astype(np.int32)
    mask = (place < np.arange(B)[:, None]) & (segments > 0)
    return Batch(tokens, np.roll(tokens, -1, 1), mask, segments, positions)


@cache
def structure_of(lora: config.Lora | None) -> Any:
    compute = config.Compute(grouped_matmul="reference", attention="reference")
    with jax.set_mesh(ONE):
        return parameters(abstract_model(MODEL, compute, lora))[0]


def gradients(
    objective: Objective,
    mesh: Mesh,
    microbatches: int = 1,
    lora: config.Lora | None = None,
    make: Callable[[], Parameters] | None = None,
    router_loss: config.Loss = config.Loss(),  # noqa: B008  # immutable
    rows: Any = None,
) -> StepGradients:
    """Of `step_gradients`, on the host. make: the weights, drawn at random unless stated; the base's are others."""
    with jax.set_mesh(mesh):
        params = random_parameters(MODEL, lora=lora, scale=0.3) if make is None else make()
        learned, frozen = partition(params, lora)
        base = trained_in_full(learned, lora) if make else {path: x + 0.5 for path, x in trained_in_full(learned, lora).items()}
        structure = structure_of(lora)
        if objective.uses_reference:
            structure = with_expert_ids(structure)
        definition = StepDefinition(structure, objective, optax.identity(), microbatches=microbatches, router_loss=router_loss)
        run = jax.jit(partial(step_gradients, definition, key=None))
        return jax.device_get(run(learned, ModelWeights({}, frozen, base), put_batch(batch() if rows is None else rows, mesh)))


@cache
def plain_gradients(loss: Callable[[Transformer, Transformer, Any], Any], lora: config.Lora | None = None) -> tuple[Any, Any]:
    """(value, gradients) of `loss(model, base model, batch)` over the whole batch on one device, for `gradients` to equal."""
    with jax.set_mesh(ONE):
        learned, frozen = partition(random_parameters(MODEL, lora=lora, scale=0.3), lora)
        base = combine(structure_of(None), frozen, {path: x + 0.5 for path, x in trained_in_full(learned, lora).items()} or learned)
        run = jax.jit(jax.value_and_grad(lambda p, f, b, base: loss(combine(structure_of(lora), p, f), base, b)))
        return jax.device_get(run(learned, frozen, put_batch(batch(), ONE), base))


def plain_logprobs(model: Transformer, batch: Any) -> tuple[jax.Array, jax.Array]:
    """(log-probabilities of all tokens (B, T, V), those of the targets (B, T)), by a softmax over all logits."""
    hidden, _ = model(batch.tokens, batch.positions, batch.segment_ids)
    logprobs = jax.nn.log_softmax(model.logits(hidden))
    return logprobs, jnp.sum(jnp.where(batch.targets[..., None] == jnp.arange(V), logprobs, 0), axis=-1)


def check_equal(found: StepGradients, wanted: tuple[Any, Any], tolerance: float = 2e-5) -> None:
    value, gradients = wanted
    np.testing.assert_allclose(found.loss, value, rtol=tolerance)
    assert found.gradients.keys() == gradients.keys()
    for path, b in gradients.items():
        assert np.max(np.abs(b)) > 0, path
        assert np.max(np.abs(found.gradients[path] - b)) <= tolerance * np.max(np.abs(b)), path
