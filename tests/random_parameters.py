"""Random weights of any model, so that no test passes by chance; their shapes; and equality bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding

from moe_train import config
from moe_train.model.parameters import Parameters, parameters
from moe_train.model.transformer import abstract_model


def abstract(
    model: config.Model, dtype: str = "float32", lora: config.Lora | None = None, encoder: config.Encoder | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of all weights, on the mesh in force."""
    compute = config.Compute(param_dtype=dtype)
    return parameters(abstract_model(model, compute, lora, encoder))[1]


def random_parameters(
    model: config.Model,
    dtype: str = "float32",
    lora: config.Lora | None = None,
    scale: float = 0.1,
    seed: int = 0,
    encoder: config.Encoder | None = None,
) -> Parameters:
    """Normal weights of standard deviation `scale`, lora_b included, on the mesh in force; the same numbers on any mesh."""
    mesh, draw = jax.sharding.get_mesh(), np.random.default_rng(seed).normal
    return {
        path: jax.device_put(draw(0, scale, like.shape).astype(like.dtype), NamedSharding(mesh, like.sharding.spec))
        for path, like in abstract(model, dtype, lora, encoder).items()
    }


def assert_equal(ours: Mapping[str, jax.Array], theirs: Mapping[str, jax.Array]) -> None:
    """The same paths, dtypes and bits."""
    assert set(ours) == set(theirs)
    for path, array in ours.items():
        assert array.dtype == theirs[path].dtype
        assert np.array_equal(np.asarray(array), np.asarray(theirs[path])), path
