"""Sums of outer products in either order of their operands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train.model.outer_products import NARROW, is_faster_transposed, sum_of_outer_products

WIDE = 64


@pytest.mark.parametrize("outputs", [1, WIDE // NARROW, WIDE // NARROW + 1, WIDE, 3 * WIDE])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_it_is_the_product_of_the_transpose(rows: int, outputs: int) -> None:
    rng = np.random.default_rng(outputs)
    x, dy = (rng.normal(size=(rows, columns)).astype(np.float32) for columns in (WIDE, outputs))
    found = jax.jit(sum_of_outer_products)(x, dy)
    np.testing.assert_allclose(found, x.T.astype(np.float64) @ dy, rtol=1e-5, atol=1e-5)


def test_xla_keeps_the_order_of_the_operands() -> None:
    """The product of a narrow gradient has its columns last: XLA would swap the operands of a plain transposition."""
    x, dy = jnp.ones((128, WIDE)), jnp.ones((128, 2))
    assert is_faster_transposed(WIDE, 2)
    text = jax.jit(sum_of_outer_products).lower(x, dy).compile().as_text()
    assert f"f32[2,{WIDE}]{{1,0}} dot(" in text
    assert f"f32[{WIDE},2]{{1,0}} dot(" not in text
