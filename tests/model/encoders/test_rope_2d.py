"""Rotary positions in two dimensions against their definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from moe_train.model.encoders.rope_2d import rotate_2d
from tests.tiny import ONE


def test_pairs_turn_by_row_and_by_column() -> None:
    H, theta = 12, 100.0
    draw = np.random.default_rng(0)
    x = draw.normal(size=(2, 5, 3, H)).astype(np.float32)
    places = draw.integers(0, 9, (2, 5, 2)).astype(np.int32)
    freqs = theta ** (-np.arange(0, H, 2) / H)
    angles = np.concatenate([places[..., :1] * freqs[0::2], places[..., 1:] * freqs[1::2]], axis=-1)[:, :, None]
    pairs = x[..., : H // 2] + 1j * x[..., H // 2 :]
    turned = pairs * np.exp(1j * angles)
    with jax.set_mesh(ONE):
        found = np.asarray(rotate_2d(jnp.asarray(x), jnp.asarray(places), theta))
    assert np.abs(found - np.concatenate([turned.real, turned.imag], axis=-1)).max() < 1e-5
