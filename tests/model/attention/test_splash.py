"""Splash attention in interpret mode; its masks and meshes are tested with all kernels in test_kernels.py."""

from __future__ import annotations

import jax.numpy as jnp

from tests.model.attention.against_reference import check, operands


def test_splash_in_bfloat16() -> None:
    check("splash", None, operands(128, jnp.bfloat16), 2e-2)
