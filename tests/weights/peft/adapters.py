"""Adapters with random numbers, on the mesh in force, and the settings in a directory of PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from moe_train import config
from moe_train.model.lora import scale_of_expert
from moe_train.model.paths import ParameterPath
from tests import random_parameters, tiny

MIXTRAL = tiny.MIXTRAL.model_copy(update={"num_layers": 2})


def lora_of(*targets: tuple[str, int, float]) -> config.Lora:
    return config.Lora(targets=tuple(config.LoraTarget(modules=(m,), rank=rank, alpha=alpha) for m, rank, alpha in targets))


def abstract(lora: config.Lora, dtype: str = "float32") -> dict[str, jax.ShapeDtypeStruct]:
    shapes = random_parameters.abstract(MIXTRAL, lora=lora)
    return {
        p: jax.ShapeDtypeStruct(like.shape, dtype, sharding=like.sharding)
        for p, like in shapes.items()
        if ParameterPath.parse(p).is_adapter
    }


def adapters(lora: config.Lora, dtype: str = "float32") -> dict[str, jax.Array]:
    mesh, draw = jax.sharding.get_mesh(), np.random.default_rng(0).normal
    return {
        path: jax.device_put(draw(0, 1, like.shape).astype(like.dtype), NamedSharding(mesh, like.sharding.spec))
        for path, like in abstract(lora, dtype).items()
    }


def settings_in(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "adapter_config.json").read_text())


LORA = lora_of(("attention.q_proj", 2, 3.0), ("attention.o_proj", 3, 6.0), ("ffn.*_proj", 3, 6.0))


def trained(lora: config.Lora) -> dict[str, jax.Array]:
    """Adapters, and what is trained in full beside them."""
    shapes = random_parameters.abstract(MIXTRAL, lora=lora)
    mesh, draw = jax.sharding.get_mesh(), np.random.default_rng(0).normal
    found = {}
    for path, like in shapes.items():
        if ParameterPath.parse(path).is_trained(lora):
            x = draw(0, 1, like.shape).astype(like.dtype)
            targets = lora.targets_of(ParameterPath.parse(path).module)
            if ".lora_" in path and any(t.experts for t in targets):  # past an expert's rank there are zeros
                for e in range(4):
                    rank = scale_of_expert(lora, targets, e)[1]
                    x[:, e, ..., rank:] = 0 if path.endswith("_a") else x[:, e, ..., rank:]
                    x[:, e, rank:] = 0 if path.endswith("_b") else x[:, e, rank:]
            found[path] = jax.device_put(x, NamedSharding(mesh, like.sharding.spec))
    return found


BY_EXPERT = config.Lora(
    targets=(
        config.LoraTarget(modules=("ffn.*",), rank=3, alpha=6.0, experts=(0, 2)),
        config.LoraTarget(modules=("ffn.*",), rank=2, alpha=1.0, experts=(3,)),
    ),
    rslora=True,
)
