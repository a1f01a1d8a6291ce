"""The audio tower against a plain reference of a chunk alone, and a model that lacks one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train.model.encoders.audio import LayerNorm
from moe_train.model.encoders.media import Media
from moe_train.model.parameters import parameters
from moe_train.model.transformer import abstract_model, init_model
from tests.commands.audio_wrapper import ENCODER
from tests.tiny import LORA, MINISTRAL, ONE


def gelu(x: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.gelu(x, approximate=False))


def norm(x: np.ndarray, layer: Any) -> np.ndarray:
    scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return scaled * np.asarray(layer.scale) + np.asarray(layer.bias)


def convolved(x: np.ndarray, layer: Any, stride: int) -> np.ndarray:
    padded = np.pad(x, ((1, 1), (0, 0)))
    weight, bias = np.asarray(layer.weight).reshape(3, x.shape[1], -1), np.asarray(layer.bias)
    return gelu(np.stack([np.einsum("wm,wmd->d", padded[i : i + 3], weight) + bias for i in range(0, len(x), stride)]))


def reference(audio: Any, frames: np.ndarray) -> np.ndarray:
    """The features of one chunk."""
    tower = audio.tower
    x = convolved(convolved(frames, tower.first_conv, 1), tower.second_conv, 2) + np.asarray(tower.positions)
    layer = jax.tree.map(lambda w: np.asarray(w)[0], tower.layers)
    h = norm(x, layer.attention_norm)
    heads = layer.attention
    q = np.einsum("sd,dnh->snh", h, heads.q_proj.weight) + heads.q_proj.bias
    v = np.einsum("sd,dnh->snh", h, heads.v_proj.weight) + heads.v_proj.bias
    scores = np.exp(np.einsum("snh,tnh->nst", q, np.einsum("sd,dnh->snh", h, heads.k_proj.weight)) / np.sqrt(8))
    y = np.einsum("nst,tnh->snh", scores / scores.sum(-1, keepdims=True), v)
    x = x + np.einsum("snh,nhd->sd", y, heads.o_proj.weight) + heads.o_proj.bias
    h = gelu(norm(x, layer.ffn_norm) @ layer.up_proj.weight + layer.up_proj.bias)
    x = norm(x + h @ layer.down_proj.weight + layer.down_proj.bias, tower.norm)
    return gelu(x.reshape(4, 64) @ np.asarray(audio.projector.in_proj.weight)) @ np.asarray(audio.projector.out_proj.weight)


def test_features_of_packed_chunks_equal_those_of_each_alone() -> None:
    frames = np.random.default_rng(0).normal(size=(2, 3, 32, 8)).astype(np.float32)
    ids = np.array([[1, 2, 3], [1, 0, 0]], np.int32)
    with jax.set_mesh(ONE):
        audio = init_model(0, MINISTRAL, encoder=ENCODER).audio
        assert audio is not None
        leaves, tree = jax.tree.flatten(audio)
        draw = np.random.default_rng(1)
        audio = jax.tree.unflatten(
            tree, [jax.device_put(draw.normal(0, 0.3, x.shape).astype(np.float32), x.sharding) for x in leaves]
        )
        index = np.full((2, 1), -1, np.int32)
        places = np.zeros((2, 3, 2), np.int32)
        found = np.asarray(jax.jit(lambda a: a(Media(frames, places, ids, index).placed()))(audio))
        plain = jax.tree.unflatten(tree, [np.asarray(x) for x in jax.tree.leaves(audio)])
    for row, chunk in ((0, 0), (0, 1), (0, 2), (1, 0)):
        expected = reference(plain, frames[row, chunk])
        of_chunk = found[row, 4 * chunk : 4 * chunk + 4]
        assert np.abs(of_chunk - expected).max() < 2e-5 * np.abs(expected).max()


def test_layer_norm_of_constant_rows_is_the_bias() -> None:
    with jax.set_mesh(ONE):
        layer = LayerNorm(4, jnp.dtype(jnp.float32))
        assert np.array_equal(layer(jnp.full((1, 2, 4), 3.0)), np.zeros((1, 2, 4)))


def test_the_text_model_of_a_seed_does_not_depend_on_a_tower() -> None:
    with jax.set_mesh(ONE):
        plain = parameters(init_model(3, MINISTRAL))[1]
        hearing = parameters(init_model(3, MINISTRAL, encoder=ENCODER))[1]
        assert all(np.array_equal(x, hearing[path]) for path, x in plain.items())
        adapted = parameters(abstract_model(MINISTRAL, lora=LORA, encoder=ENCODER))[1]
    assert not [path for path in adapted if path.startswith("audio.") and "lora" in path]


def test_sound_needs_a_tower() -> None:
    with jax.set_mesh(ONE):
        ids = jnp.zeros((1, 4), jnp.int32)
        sound = Media(jnp.zeros((1, 4, 32, 8)), jnp.zeros((1, 4, 2), jnp.int32), ids, ids)
        with pytest.raises(ValueError, match="no audio tower"):
            abstract_model(MINISTRAL).with_media(jnp.zeros((1, 4, MINISTRAL.model_dim)), sound)
