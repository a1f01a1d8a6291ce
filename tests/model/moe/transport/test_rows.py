"""Copies between tokens and rows of a buffer, against plain indexing and scatter-adds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_train.model.moe.transport.rows import Placement, from_rows, permute, to_rows

# 4 tokens with 2 assignments each; 5 of these are in a buffer of 6 rows, whose row 2 is unused.
ROW = np.array([[0, 3], [1, 0], [4, 5], [0, 0]])
PRESENT = np.array([[True, True], [True, False], [True, True], [False, False]])
TOKEN = np.array([0, 1, 3, 0, 2, 2])
USED = np.array([True, True, False, True, True, True])
PLACEMENT = Placement(*map(jnp.asarray, (TOKEN, USED, ROW, PRESENT)))


@jax.jit
def both(x_mD: Any, y_SD: Any) -> Any:
    """Each copy with its gradient at the other's operand."""
    rows, to_vjp = jax.vjp(lambda x: to_rows(x, PLACEMENT), x_mD)
    tokens, from_vjp = jax.vjp(lambda y: from_rows(y, PLACEMENT), y_SD)
    return rows, to_vjp(y_SD)[0], tokens, from_vjp(x_mD)[0]


def test_tokens_go_to_rows_and_rows_are_summed() -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(n, 3)).astype(np.float32) for n in (4, 6))
    rows, dx, tokens, dy = both(x, y)
    wanted_rows = np.where(USED[:, None], x[TOKEN], 0)
    wanted_tokens = np.zeros_like(x)
    np.add.at(wanted_tokens, TOKEN[USED], y[USED])
    for found, wanted in ((rows, wanted_rows), (dy, wanted_rows), (tokens, wanted_tokens), (dx, wanted_tokens)):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_the_gradient_of_a_permutation_is_its_inverse() -> None:
    order = jnp.array([2, 0, 3, 1])
    x, dy = jnp.arange(4.0), jnp.array([10.0, 20.0, 30.0, 40.0])
    y, vjp = jax.vjp(lambda x: permute(x, order, jnp.argsort(order)), x)
    assert y.tolist() == [2, 0, 3, 1]
    assert vjp(dy)[0].tolist() == [20, 40, 10, 30]
