"""The dense feed-forward layer against its equation in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_train import config
from moe_train.model.ffn import DenseFfn
from tests.tiny import MINISTRAL, ONE


def test_swiglu_against_numpy() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    with jax.set_mesh(ONE):
        ffn = DenseFfn(nnx.Rngs(0), MINISTRAL.model_copy(update={"init_stddev": 0.5}), config.Compute(), ffn_dim=12)
        y = ffn(jnp.asarray(x))
        gate, up, down = (np.asarray(linear.weight[...]) for linear in (ffn.gate_proj, ffn.up_proj, ffn.down_proj))
    wanted = ((x @ gate) / (1 + np.exp(-(x @ gate))) * (x @ up)) @ down
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
