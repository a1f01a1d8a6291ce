"""Weights drawn at random, with which no test passes by chance."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import NamedSharding

from moe_train import config
from moe_train.model.parameters import Parameters, parameters
from moe_train.model.transformer import init_model


def random_parameters(
    model: config.Model, dtype: str = "float32", lora: config.Lora | None = None, scale: float = 0.1, seed: int = 0
) -> Parameters:
    """Normal weights of standard deviation `scale`, the adapters' B included, on the mesh in force; on any mesh the same."""
    compute = config.Compute(param_dtype=dtype)
    abstract = parameters(jax.eval_shape(lambda: init_model(0, model, compute, lora)))[1]
    mesh, draw = jax.sharding.get_mesh(), np.random.default_rng(seed).normal
    return {
        path: jax.device_put(draw(0, scale, like.shape).astype(like.dtype), NamedSharding(mesh, like.sharding.spec))
        for path, like in abstract.items()
    }
