"""The references of the self-tests against JAX's own gradients of plain formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from moe_train.model.attention.kernels import reference_attention
from moe_train.model.moe.grouped_matmul import reference_grouped_matmul
from moe_train.run.self_test_references import attention_and_gradients, grouped_matmul_and_gradients


def test_attention_and_its_gradients():
    rng = np.random.default_rng(0)
    shapes = ((1, 6, 4, 8), (1, 6, 2, 8), (1, 6, 2, 4), (1, 6, 4, 4))
    q, k, v, dy = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    visible = np.tril(np.ones((1, 6, 6), bool)) & ~np.tril(np.ones((6, 6), bool), -3)
    y, vjp = jax.vjp(lambda q, k, v: reference_attention(q, k, v, jnp.asarray(visible)), q, k, v)
    for actual, expected in zip(attention_and_gradients(q, k, v, dy, visible), (y, *vjp(dy)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_grouped_matmul_and_its_gradients():
    rng = np.random.default_rng(0)
    x, w, dy = (rng.normal(size=shape).astype(np.float32) for shape in ((7, 3), (3, 3, 2), (7, 2)))
    sizes = (2, 0, 4)  # the last row belongs to no expert
    y, vjp = jax.vjp(lambda x, w: reference_grouped_matmul(x, w, jnp.array(sizes)), x, w)
    for actual, expected in zip(grouped_matmul_and_gradients(x, w, dy, sizes), (y, *vjp(dy)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
