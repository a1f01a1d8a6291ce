"""Log-probabilities of chosen tokens, of the rest and of the target against all logits at once, over meshes."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.machine.mesh import BATCH
from moe_train.train import logits
from moe_train.train.chosen_logprobs import chosen_logprobs
from tests.meshes import mesh_of

B, T, D, J, V, K = 4, 72, 12, 3, 48, 5
MESHES = {"one device": mesh_of(config.Mesh()), "fsdp, context, tensor": mesh_of(config.Mesh(fsdp=2, context=2, tensor=2))}
SPECS = (P(BATCH, "context", None), P("tensor", "fsdp"), P(BATCH, "context", None), P("tensor", None))
TEMPERATURE = 1.7


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 tokens at a time, which no mesh's part is a multiple of."""
    monkeypatch.setattr(logits, "CHUNK_ELEMENTS", 128 * V)


def operands(scale: float = 1.0) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray, np.ndarray]:
    """(hidden, head and the two LoRA factors; k different tokens; targets; a weight for each output)."""
    rng = np.random.default_rng(0)
    shapes = ((B, T, D), (V, D), (B, T, J), (V, J))
    inputs = tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)
    chosen = np.argsort(rng.random((B, T, V)), axis=-1)[..., :K].astype(np.int32)
    weights = rng.normal(size=(B, T, K + 2)).astype(np.float32)
    return (inputs[0] * np.float32(scale), *inputs[1:]), chosen, rng.integers(0, V, (B, T)).astype(np.int32), weights


def plain_logits(inputs: Any) -> jax.Array:
    hidden, head, x, w = inputs
    return jnp.einsum("BTD,VD->BTV", hidden, head) + jnp.einsum("BTJ,VJ->BTV", x, w)


@jax.jit
def plain(inputs: Any, chosen: Any, targets: Any, weights: Any) -> Any:
    """(outputs, gradients) of all logits at once."""

    def total(inputs: Any) -> Any:
        logprobs = jax.nn.log_softmax(plain_logits(inputs) / TEMPERATURE)
        is_chosen = (chosen[..., None] == jnp.arange(V)).any(axis=-2)
        at_chosen = jnp.take_along_axis(logprobs, chosen, axis=-1)
        tail = jax.nn.logsumexp(logprobs, axis=-1, where=~is_chosen)
        at_target = jnp.take_along_axis(jax.nn.log_softmax(plain_logits(inputs)), targets[..., None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        joined = jnp.concatenate([at_chosen, tail[..., None], at_target[..., None]], axis=-1)
        return jnp.sum(weights * joined), (at_chosen, tail, at_target, jnp.max(logprobs, axis=-1), entropy)

    gradients, outputs = jax.grad(total, has_aux=True)(inputs)
    return outputs, gradients


def exact(inputs: Any, chosen: Any, targets: Any, weights: Any) -> Any:
    with jax.enable_x64(True):
        return jax.device_get(plain(tuple(np.float64(x) for x in inputs), chosen, targets, np.float64(weights)))


@cache
def chunked(mesh: Mesh) -> Any:
    def total(inputs: Any, chosen: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
        hidden, head, *factors = inputs
        outputs = chosen_logprobs(hidden, head, chosen, targets, TEMPERATURE, tuple(factors))  # type: ignore[arg-type]
        value = jnp.sum(weights[..., :K] * outputs.chosen)
        return value + jnp.sum(weights[..., K] * outputs.tail + weights[..., K + 1] * outputs.target), outputs

    def run(*operands: Any) -> Any:
        gradients, outputs = jax.grad(total, has_aux=True)(*operands)
        return outputs, gradients

    return jax.jit(run)


def put(mesh: Mesh, x: Any, spec: P) -> jax.Array:
    return jax.device_put(x, NamedSharding(mesh, spec))


def on_mesh(mesh: Mesh, inputs: Any, *per_token: Any) -> Any:
    placed = tuple(put(mesh, x, spec) for x, spec in zip(inputs, SPECS, strict=True))
    return placed, *(put(mesh, x, P(BATCH, "context")) for x in per_token)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_chunks_equal_all_logits_at_once(mesh: str, scale: float) -> None:
    """With large logits, where a token or the tail has nearly all the probability, too."""
    expected, expected_gradients = exact(*operands(scale))
    with jax.set_mesh(MESHES[mesh]):
        outputs, gradients = jax.device_get(chunked(MESHES[mesh])(*on_mesh(MESHES[mesh], *operands(scale))))
    for name, output, wanted in zip(outputs._fields, outputs, expected, strict=True):
        np.testing.assert_allclose(output, wanted, rtol=1e-5, atol=1e-5 * scale, err_msg=name)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert np.max(np.abs(gradient - wanted)) <= 2e-5 * np.max(np.abs(wanted))
