"""The small parts against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_train.model import layers
from tests.tiny import ONE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_is_taken_in_float32(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(100 * rng.normal(size=(2, 3, 64)), dtype)
    with jax.set_mesh(ONE):
        norm = layers.RMSNorm(64, 1e-5, jnp.dtype("float32"))
        norm.scale = nnx.Param(jnp.asarray(rng.normal(size=64), jnp.float32))
        y = norm(x)
    exact = np.asarray(x, np.float64)
    wanted = exact / np.sqrt(np.mean(exact**2, axis=-1, keepdims=True) + 1e-5) * np.asarray(norm.scale[...])
    assert y.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=1e-5 if dtype == "float32" else 2**-8)


@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (2, 1), (1, 1)])
def test_the_gradient_of_a_norm_s_scale_is_the_sum_over_all_tokens(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=(*shape, 8)).astype(np.float32) for _ in range(2))

    def norm(scale: jax.Array) -> jax.Array:
        layer = layers.RMSNorm(8, 1e-5, jnp.dtype("float32"))
        layer.scale = nnx.Param(scale)
        return layer(jnp.asarray(x))

    with jax.set_mesh(ONE):
        y, gradient = jax.vjp(norm, jnp.ones(8))
        (found,) = gradient(dy)
    np.testing.assert_allclose(found, np.sum(np.asarray(y, np.float64) * dy, axis=(0, 1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("equation", "to_rank", "from_rank"),
    [
        ("BTD,DNH->BTNH", "BTD,DJ->BTJ", "BTJ,JNH->BTNH"),
        ("BTNH,NHD->BTD", "BTNH,NHJ->BTJ", "BTJ,JD->BTD"),
        ("BTF,FD->BTD", "BTF,FJ->BTJ", "BTJ,JD->BTD"),
    ],
)
def test_a_map_through_a_rank(equation: str, to_rank: str, from_rank: str) -> None:
    assert layers.lora_equations(equation) == (to_rank, from_rank)


def test_linear_with_an_adapter_is_the_merged_weight() -> None:
    rng = np.random.default_rng(0)
    x, w, a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 8), (8, 4, 6), (8, 2), (2, 4, 6)))
    with jax.set_mesh(ONE):
        linear = layers.Linear(nnx.Rngs(0), "BTD,DNH->BTNH", w.shape, P("fsdp", "tensor", None), 1.0, jnp.dtype("float32"))
        linear.weight, linear.lora_a, linear.lora_b = (
            nnx.Param(jax.device_put(p, jax.NamedSharding(ONE, spec)))
            for p, spec in ((w, P("fsdp", "tensor", None)), (a, P("fsdp", None)), (b, P(None, "tensor", None)))
        )
        linear.lora_scale = 0.5
        y = linear(jax.device_put(x, jax.NamedSharding(ONE, P(("data", "fsdp", "expert"), "context", None))))
    wanted = np.einsum("BTD,DNH->BTNH", x, w + 0.5 * np.einsum("DJ,JNH->DNH", a, b))
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
