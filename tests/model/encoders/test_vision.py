"""The vision tower against a plain reference of a picture alone, and a model that lacks one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moe_train import config
from moe_train.machine.mesh import make_mesh
from moe_train.model.encoders.media import Media
from moe_train.model.encoders.rope_2d import rotate_2d
from moe_train.model.encoders.vision import Vision
from moe_train.model.parameters import combine_some, parameters
from moe_train.model.sharding.specs import place
from moe_train.model.transformer import abstract_model, init_model
from tests.tiny import LORA, MINISTRAL, ONE

ENCODER = config.VisionEncoder(
    tower_dim=16, ffn_dim=12, num_layers=2, num_heads=2, patch_size=2, max_image_size=16, merge_size=2, projector_norm=True,
    projector_bias=True, activation="gelu",
)  # fmt: skip
TEXT_DIM = 6


def gelu(x: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.gelu(x, approximate=False))


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def reference(vision: Vision, patches: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The features of one picture."""
    tower, projector = vision.tower, vision.projector
    x = rms(patches @ np.asarray(tower.patch_proj.weight[...]))
    for layer in range(2):
        weights = jax.tree.map(lambda w, layer=layer: np.asarray(w)[layer], tower.layers)
        h = rms(x)
        q, k, v = (
            np.einsum("PD,DNH->PNH", h, w.weight[...])
            for w in (weights.attention.q_proj, weights.attention.k_proj, weights.attention.v_proj)
        )
        q, k = (np.asarray(rotate_2d(jnp.asarray(z[None]), jnp.asarray(places[None]), ENCODER.theta))[0] for z in (q, k))
        scores = np.exp(np.einsum("PNH,SNH->NPS", q, k) / np.sqrt(8))
        y = np.einsum("NPS,SNH->PNH", scores / scores.sum(-1, keepdims=True), v)
        x = x + np.einsum("PNH,NHD->PD", y, weights.attention.o_proj.weight[...])
        ffn, h = weights.ffn, rms(x)
        x = x + (gelu(h @ ffn.gate_proj.weight[...]) * (h @ ffn.up_proj.weight[...])) @ ffn.down_proj.weight[...]
    cells = rms(x).reshape(-1, 4, 16).swapaxes(1, 2).reshape(-1, 64)  # channel by channel
    h = cells @ np.asarray(projector.merge_proj.weight[...]) @ np.asarray(projector.in_proj.weight[...]) + np.asarray(
        projector.in_proj.bias[...]
    )
    return gelu(h) @ np.asarray(projector.out_proj.weight[...]) + np.asarray(projector.out_proj.bias[...])


def test_features_of_packed_pictures_equal_those_of_each_alone() -> None:
    draw = np.random.default_rng(0)
    patches = draw.normal(size=(2, 32, ENCODER.patch_values)).astype(np.float32)
    places = draw.integers(0, 6, (2, 32, 2)).astype(np.int32)
    ids = np.zeros((2, 32), np.int32)
    ids[0, :12], ids[0, 12:20], ids[1, :4] = 1, 2, 1
    with jax.set_mesh(ONE):
        vision = init_model(0, MINISTRAL, encoder=ENCODER).vision
        assert vision is not None
        for projection in (vision.projector.in_proj, vision.projector.out_proj):
            projection.bias[...] = draw.normal(size=projection.bias[...].shape)
        # Larger, so that attention is far from even.
        vision = jax.tree_util.tree_map_with_path(lambda keys, w: w if "scale" in str(keys) else 10 * w, vision)
        index = np.full((2, 1), -1, np.int32)
        found = np.asarray(jax.jit(lambda v: v(Media(patches, places, ids, index).placed()))(vision))
        for row, picture in ((0, 1), (0, 2), (1, 1)):
            own = ids[row] == picture
            expected = reference(vision, patches[row][own], places[row][own])
            of_picture = found[row][own[::4]]
            assert np.abs(of_picture - expected).max() < 2e-5 * np.abs(expected).max()


def test_the_text_model_of_a_seed_does_not_depend_on_a_tower() -> None:
    with jax.set_mesh(ONE):
        plain = parameters(init_model(3, MINISTRAL))[1]
        seeing = parameters(init_model(3, MINISTRAL, encoder=ENCODER))[1]
        assert all(np.array_equal(x, seeing[path]) for path, x in plain.items())
        adapted = parameters(abstract_model(MINISTRAL, lora=LORA, encoder=ENCODER))[1]
    assert not [path for path in adapted if path.startswith("vision.") and "lora" in path]


def test_pictures_need_a_tower() -> None:
    with jax.set_mesh(ONE):
        pictures = Media(jnp.zeros((1, 4, 12)), jnp.zeros((1, 4, 2), jnp.int32), *(jnp.zeros((1, 4), jnp.int32),) * 2)
        with pytest.raises(ValueError, match="no vision tower"):
            abstract_model(MINISTRAL).with_media(jnp.zeros((1, 4, MINISTRAL.model_dim)), pictures)


ADAPTERS = config.Lora(
    targets=(config.LoraTarget(modules=("vision.*_proj",), rank=2, alpha=4.0),), train=("vision.tower.*norm",), dropout=0.5
)


@pytest.mark.slow
def test_gradients_of_adapters_and_their_dropout_do_not_depend_on_the_mesh() -> None:
    draw = np.random.default_rng(4)
    patches = draw.normal(size=(4, 32, ENCODER.patch_values)).astype(np.float32)
    places = draw.integers(0, 6, (4, 32, 2)).astype(np.int32)
    ids = np.repeat([[1] * 12 + [2] * 16 + [0] * 4], 4, axis=0).astype(np.int32)
    index = np.full((4, 2), -1, np.int32)
    weight = draw.normal(size=(4, 8, MINISTRAL.model_dim)).astype(np.float32)

    def found(mesh: jax.sharding.Mesh, key: jax.Array | None) -> dict[str, np.ndarray]:
        with jax.set_mesh(mesh):
            structure, shapes = parameters(abstract_model(MINISTRAL, lora=ADAPTERS, encoder=ENCODER))
            of_tower = {path: x for path, x in shapes.items() if path.startswith("vision.")}
            numbers = np.random.default_rng(7)
            weights = {
                path: jax.device_put(numbers.normal(0, 0.3, x.shape).astype(np.float32), NamedSharding(mesh, x.sharding.spec))
                for path, x in sorted(of_tower.items())
            }

            def loss(weights: dict[str, jax.Array]) -> jax.Array:
                vision = combine_some(structure, weights).vision
                return jnp.sum(vision(Media(patches, places, ids, index).placed(), key) * place(weight, "BTD"))

            gradients = jax.jit(jax.grad(loss))(weights)
            return {path: np.asarray(x) for path, x in gradients.items()}

    many = make_mesh(config.Mesh(data=2, context=2, tensor=2))
    for key in (None, jax.random.key(3)):
        one = found(ONE, key)
        assert all(np.abs(x).max() > 0 for x in one.values())
        for path, x in found(many, key).items():
            assert np.abs(x - one[path]).max() < 1e-4 * np.abs(one[path]).max(), path
    plain = found(ONE, None)
    assert any(not np.allclose(x, one[path]) for path, x in plain.items())  # dropout has an effect
