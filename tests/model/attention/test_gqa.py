"""Grouped-query attention: the scale of queries by their position."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from moe_train import config
from moe_train.model.attention import gqa


def test_query_scaling() -> None:
    scaling = config.QueryScaling(beta=0.1, original_max_seq_len=8)
    positions = np.array([[0, 7, 8, 15, 16, 80]])
    wanted = 1 + 0.1 * np.log([1, 1, 2, 2, 3, 11])
    found = gqa._query_scale(scaling, jnp.asarray(positions))
    np.testing.assert_allclose(found[0, :, 0, 0], wanted, rtol=1e-6)
