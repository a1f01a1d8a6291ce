"""Multi-head latent attention against float64 numpy, on one device and on meshes, packed and token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from moe_train import config
from moe_train.machine.mesh import make_mesh, put_batch
from moe_train.model.attention import rope
from moe_train.model.attention.mla import LATENT_NORM_EPS, MultiHeadLatentAttention
from moe_train.model.attention.places import TokenPlaces
from tests.compiled_programs import collectives_of
from tests.tiny import MISTRAL4, ONE

D, T, B = MISTRAL4.model_dim, 40, 4
ATTENTION = MISTRAL4.attention
assert isinstance(ATTENTION, config.MultiHeadLatentAttention)
SEGMENTS = np.stack([np.repeat([1, 2, 0], [23, 12, 5]), np.ones(T, int)] * 2).astype(np.int32)
POSITIONS = np.stack([np.r_[np.arange(23), np.arange(12), np.zeros(5)], np.arange(T)] * 2).astype(np.int32)
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


def rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + LATENT_NORM_EPS) * scale


def rotated(x: np.ndarray, position: int, rope: config.YarnRope) -> np.ndarray:
    """Rotate the pairs (x[2i], x[2i + 1]); YaRN's frequencies, whose two mscales cancel."""
    P = x.shape[-1]
    betas = (rope.beta_fast, rope.beta_slow)
    plain = rope.theta ** (-np.arange(0, P, 2) / P)
    low, high = (P * math.log(rope.original_max_seq_len / (b * 2 * math.pi)) / (2 * math.log(rope.theta)) for b in betas)
    first_pair, last_pair = max(math.floor(low), 0), min(math.ceil(high), P - 1)
    ramp = np.clip((np.arange(P // 2) - first_pair) / (last_pair - first_pair), 0, 1)
    angle = position * (plain / rope.factor * ramp + plain * (1 - ramp))
    first, second = x[..., ::2], x[..., 1::2]
    pairs = first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)
    return np.stack(pairs, axis=-1).reshape(x.shape)


def BETAS(rope: config.YarnRope) -> tuple[float, float]:
    return rope.beta_fast, rope.beta_slow


def reference(model: config.Model, weights: Mapping[str, np.ndarray], x: np.ndarray, correction: float) -> np.ndarray:
    """One document of attention, head by head and query by query, in float64."""
    a, rope = model.attention, model.rope
    assert isinstance(a, config.MultiHeadLatentAttention) and isinstance(rope, config.YarnRope)
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    n, R = a.qk_nope_head_dim, a.kv_lora_rank
    if a.q_lora_rank is None:
        q = np.einsum("td,dnh->tnh", x, w["q_proj.weight"])
    else:
        q = np.einsum("tq,qnh->tnh", rms(x @ w["q_a_proj.weight"], w["q_a_norm.scale"]), w["q_b_proj.weight"])
    compressed = x @ w["kv_a_proj.weight"]
    heads = np.einsum("tr,rnu->tnu", rms(compressed[:, :R], w["kv_a_norm.scale"]), w["kv_b_proj.weight"])
    y = np.zeros((len(x), a.num_heads, a.v_head_dim))
    for t, head in np.ndindex(len(x), a.num_heads):
        scaling = 1.0
        if a.query_scaling is not None:
            scaling = 1 + a.query_scaling.beta * math.log(1 + t // a.query_scaling.original_max_seq_len)
        q_rope = rotated(q[t, head, n:], t, rope)
        scores = np.array(
            [q[t, head, :n] @ heads[s, head, :n] + q_rope @ rotated(compressed[s, R:], s, rope) for s in range(t + 1)]
        )
        scores *= correction * scaling / math.sqrt(a.qk_head_dim)
        probabilities = np.exp(scores - scores.max())
        y[t, head] = probabilities @ heads[: t + 1, head, n:] / probabilities.sum()
    return np.einsum("tnw,nwd->td", y, w["o_proj.weight"])


def layer_of(model: config.Model) -> tuple[Any, dict[str, Any], dict[str, np.ndarray]]:
    """(structure, shapes, weights far from zero) of the layer, by name."""
    attention = model.attention
    assert isinstance(attention, config.MultiHeadLatentAttention)
    layer: Any = jax.eval_shape(lambda: MultiHeadLatentAttention(nnx.Rngs(0), model, attention, config.Compute()))
    leaves, structure = jax.tree_util.tree_flatten_with_path(layer)
    like = {f"{keys[0].name}.{keys[1].name}": leaf for keys, leaf in leaves}
    rng = np.random.default_rng(1)
    weights = {name: rng.normal(name.endswith("scale"), 0.3, x.shape).astype(np.float32) for name, x in like.items()}
    return structure, like, weights


def run(model: config.Model, mesh: Mesh) -> tuple[np.ndarray, dict[str, np.ndarray], str]:
    """Output of the layer, gradients of a sum that weights every number, and the text of the program."""
    with jax.set_mesh(mesh):
        structure, like, weights = layer_of(model)
        placed = {name: jax.device_put(w, NamedSharding(mesh, like[name].sharding.spec)) for name, w in weights.items()}

        @jax.jit
        def output(weights: Any, x: Any, positions: Any, segments: Any) -> Any:
            def total(weights: Any) -> Any:
                layer = structure.unflatten([weights[name] for name in like])
                rotation = rope.rotation(positions, model.rope, model.attention.rotated_dims)
                y = layer(x, TokenPlaces(positions, segments), rotation)[0]
                return jnp.sum(jnp.sin(y) * (segments != 0)[..., None]), y

            (_, y), gradients = jax.value_and_grad(total, has_aux=True)(weights)
            return y, gradients

        program = output.lower(placed, *put_batch((X, POSITIONS, SEGMENTS), mesh)).compile()
        return *jax.device_get(program(placed, *put_batch((X, POSITIONS, SEGMENTS), mesh))), program.as_text()


@pytest.mark.parametrize("correction", ["none", "mscale_squared"])
@pytest.mark.parametrize("rank", [None, ATTENTION.q_lora_rank])
def test_it_equals_numpy_in_float64(correction: str, rank: int | None) -> None:
    attention = ATTENTION.model_copy(update={"scale_correction": correction, "q_lora_rank": rank})
    model = MISTRAL4.model_copy(update={"attention": attention})
    y, _, _ = run(model, ONE)
    with jax.set_mesh(ONE):
        weights = layer_of(model)[2]
    factor = 1.0 if correction == "none" else (0.1 * math.log(4) + 1) ** 2
    for row, segment in ((0, 1), (0, 2), (1, 1)):
        tokens = SEGMENTS[row] == segment
        expected = reference(model, weights, X[row, tokens].astype(np.float64), factor)
        np.testing.assert_allclose(y[row, tokens], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("sizes", [config.Mesh(expert=2, fsdp=2, tensor=2), config.Mesh(context=4, tensor=2)], ids=str)
def test_every_mesh_equals_one_device(sizes: config.Mesh) -> None:
    y, gradients, program = run(MISTRAL4, make_mesh(sizes))
    expected, expected_gradients, _ = run(MISTRAL4, ONE)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in expected_gradients.items():
        np.testing.assert_allclose(gradients[name], gradient, atol=2e-5 * np.abs(gradient).max(), err_msg=name)
    if sizes.context > 1:
        gathered = [math.prod(shape) for c in collectives_of(program) if c.kind == "all-gather" for shape in c.shapes]
        assert max(gathered) == B * T * (ATTENTION.kv_lora_rank + ATTENTION.qk_rope_head_dim)  # no keys or values of heads
