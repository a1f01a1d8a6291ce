"""Rotary positions: turned pairs, the YaRN ramp, and that only differences of positions matter."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from moe_train import config
from moe_train.model.attention import rope

DEFAULT = config.DefaultRope(name="default", theta=1e4)
YARN = config.YarnRope(name="yarn", theta=1e6, factor=16.0, original_max_seq_len=16384)


def test_pairs_are_turned_as_complex_numbers() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 6)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [0, 1, 0, 1, 900]])
    pairs = x[..., :3] + 1j * x[..., 3:]
    turned = pairs * np.exp(1j * positions[..., None, None] * 1e4 ** -(np.arange(3) / 3))
    wanted = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rope.rotate(jnp.asarray(x), rope.rotation(jnp.asarray(positions), DEFAULT, 6)), wanted, atol=2e-4)


@pytest.mark.parametrize("kind", [DEFAULT, YARN], ids=["default", "yarn"])
def test_scores_depend_on_the_distance_alone(kind: config.DefaultRope | config.YarnRope) -> None:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(np.tile(rng.normal(size=8), (1, 4, 1, 1)), jnp.float32) for _ in range(2))
    at = jnp.array([[3, 10, 50, 200]])
    later, earlier = rope.rotation(at + 7, kind, 8), rope.rotation(at, kind, 8)
    scores = jnp.sum(rope.rotate(q, later) * rope.rotate(k, earlier), axis=-1)[0, :, 0]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-3)


def test_yarn_keeps_fast_dims_and_stretches_slow_ones() -> None:
    plain, one = rope.frequencies(config.DefaultRope(name="default", theta=1e6), 128)
    found, factor = rope.frequencies(YARN, 128)
    assert one == 1.0 and factor == 1.0  # mscale equals mscale_all_dim
    turns = 16384 * plain / (2 * math.pi)
    np.testing.assert_allclose(found[turns > 40], plain[turns > 40])
    np.testing.assert_allclose(found[turns < 0.8], plain[turns < 0.8] / 16)
    between = (turns > 1.3) & (turns < 25)
    assert between.any() and (found[between] < plain[between]).all() and (found[between] > plain[between] / 16).all()
    assert (np.diff(found) < 0).all()


def test_yarn_scales_attention_where_mscale_says_so() -> None:
    _, factor = rope.frequencies(YARN.model_copy(update={"mscale_all_dim": 0.0}), 128)
    assert factor == pytest.approx(0.1 * math.log(16) + 1)
    _, factor = rope.frequencies(YARN.model_copy(update={"mscale": 2.0}), 128)
    assert factor == pytest.approx((0.2 * math.log(16) + 1) / (0.1 * math.log(16) + 1))
