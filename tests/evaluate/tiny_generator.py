"""A tiny model that generates, with normal weights."""

from __future__ import annotations

from typing import Any

from moe_train import config
from moe_train.model.parameters import Parameters, parameters
from moe_train.model.transformer import abstract_model
from tests.meshes import mesh_of
from tests.random_parameters import random_parameters

SIZES: dict[str, Any] = {"vocab_size": 300, "model_dim": 16, "num_layers": 2, "max_seq_len": 256}
ATTENTION = config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8)
SPARSE = config.MoeFfn(name="moe", ffn_dim=16, num_experts=4, experts_per_token=2)
MIXTRAL = config.Model(family="mixtral", attention=ATTENTION, ffn=SPARSE, **SIZES)
ONE = mesh_of(config.Mesh())


def random_model(model: config.Model) -> tuple[Any, Parameters]:
    """Structure and normal weights on the mesh in force; the same numbers on every mesh."""
    structure, _ = parameters(abstract_model(model, config.Compute()))
    return structure, random_parameters(model, scale=0.3)
