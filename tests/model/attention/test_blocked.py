"""Attention in blocks against the plain reference."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from tests.model.attention.against_reference import check, operands


@pytest.mark.parametrize(
    ("T", "window"),
    [(300, None), (300, 2), (300, 200), (128, 1000), (20, 7), (2100, 300)],
)
def test_blocked_equals_the_reference(T: int, window: int | None) -> None:
    check("blocked", window, operands(T), 1e-5)


@pytest.mark.parametrize("heads", [(4, 4, 6), (4, 1, 10)], ids=["a key for each head", "one key for all heads"])
def test_blocked_with_other_heads(heads: tuple[int, int, int]) -> None:
    check("blocked", 50, operands(200, heads=heads), 1e-5)


@pytest.mark.parametrize("window", [None, 50])
def test_blocked_in_bfloat16(window: int | None) -> None:
    check("blocked", window, operands(300, jnp.bfloat16), 2e-2)
