"""Meshes of any size up to the 8 devices of a test."""

from __future__ import annotations

import math

import jax
from jax.sharding import Mesh

from moe_train import config
from moe_train.machine.mesh import make_mesh


def mesh_of(sizes: config.Mesh) -> Mesh:
    """A mesh of as many devices as the sizes ask for."""
    return make_mesh(sizes, jax.devices()[: math.prod(sizes.model_dump().values())])
