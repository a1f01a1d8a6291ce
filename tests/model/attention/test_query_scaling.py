"""The scale of queries by their position."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from moe_train import config
from moe_train.model.attention.query_scaling import query_scale


def test_the_factor_grows_with_each_block_of_the_original_length() -> None:
    scaling = config.QueryScaling(beta=0.1, original_max_seq_len=8)
    positions = np.array([[0, 7, 8, 15, 16, 80]])
    expected = 1 + 0.1 * np.log([1, 1, 2, 2, 3, 11])
    np.testing.assert_allclose(query_scale(scaling, jnp.asarray(positions))[0, :, 0, 0], expected, rtol=1e-6)
