"""Merged and rounded weights against sums by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train.proof.round_weights import round_weights
from tests.proof.exported import LORA
from tests.tiny import ONE

NORM = "final_norm.scale"
DOWN = "stacks.0.layers.0.ffn.down_proj"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_merged_with_their_scale_and_rounded(weights: dict[str, jax.Array], dtype: str) -> None:
    with jax.set_mesh(ONE):
        rounded = jax.device_get(round_weights(weights, LORA, jnp.dtype(dtype)))
    assert set(rounded) == {path for path in weights if ".lora_" not in path}
    down, a, b = (np.asarray(weights[f"{DOWN}.{leaf}"], np.float64) for leaf in ("weight", "lora_a", "lora_b"))
    merged = down + 3.0 / 2 * a @ b  # alpha / rank of each expert
    assert np.abs(rounded[f"{DOWN}.weight"].astype(np.float64) - merged).max() <= np.abs(merged).max() * jnp.finfo(dtype).eps
    assert not np.array_equal(rounded[f"{DOWN}.weight"], merged.astype(np.float32))


def test_norms_of_float16_files_keep_float32(weights: dict[str, jax.Array]) -> None:
    with jax.set_mesh(ONE):
        kept, rounded = (jax.device_get(round_weights(weights, LORA, jnp.dtype(d))[NORM]) for d in ("float16", "bfloat16"))
    assert np.array_equal(kept, weights[NORM])
    assert rounded.dtype == jnp.bfloat16
