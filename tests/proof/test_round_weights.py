"""Merged and rounded weights against sums by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train import config
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


def test_adapters_of_embedding_and_head_are_merged() -> None:
    rng = np.random.default_rng(0)
    embed, a, b = rng.normal(size=(6, 4)), rng.normal(size=(6, 2)), rng.normal(size=(2, 4))
    head, c, d = rng.normal(size=(6, 4)), rng.normal(size=(4, 2)), rng.normal(size=(2, 6))
    lora = config.Lora(targets=(config.LoraTarget(modules=("embed", "head"), rank=2, alpha=6.0),))
    arrays = {"embed.weight": embed, "embed.lora_a": a, "embed.lora_b": b, "head.weight": head, "head.lora_a": c, "head.lora_b": d}
    with jax.set_mesh(ONE):
        plain = {path: jnp.asarray(x, jnp.float32) for path, x in arrays.items()}
        rounded = jax.device_get(round_weights(plain, lora, jnp.dtype("bfloat16")))
    for name, merged in (("embed.weight", embed + 3 * a @ b), ("head.weight", head + 3 * (c @ d).T)):
        np.testing.assert_allclose(rounded[name].astype(np.float64), merged, atol=np.abs(merged).max() * 2**-8)


def test_norms_of_gguf_files_of_float16_keep_float32(weights: dict[str, jax.Array]) -> None:
    with jax.set_mesh(ONE):
        kept, rounded = (
            jax.device_get(round_weights(weights, LORA, jnp.dtype(d), d == "float16")[NORM]) for d in ("float16", "bfloat16")
        )
    assert np.array_equal(kept, weights[NORM])
    assert rounded.dtype == jnp.bfloat16
