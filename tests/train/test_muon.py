"""Orthogonalised momentum against plain numpy, on meshes, and which weights are matrices to it."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.model.paths import ParameterPath
from moe_train.train.muon import matrix_dims, orthogonalize
from tests.commands.audio_wrapper import ENCODER
from tests.meshes import mesh_of
from tests.random_parameters import abstract
from tests.tiny import MISTRAL4, ONE
from tests.train.optimizer_reference import LORA, is_matrix, newton_schulz, random_parameters, relative

VISION = config.VisionEncoder(
    tower_dim=8, ffn_dim=12, num_layers=2, num_heads=2, patch_size=2, max_image_size=8, merge_size=2, projector_bias=True
)


@pytest.mark.parametrize("sizes", [config.Mesh(fsdp=2, expert=2, tensor=2), config.Mesh(fsdp=4, tensor=2)], ids=str)
def test_muon_orthogonalizes_each_layer_and_expert(sizes):
    """Also where the two layers cannot be dealt out to all devices that share a layer's matrices (fsdp 4)."""
    path, mesh = "stacks.0.layers.0.ffn.gate_proj.weight", mesh_of(sizes)
    x = np.random.default_rng(0).normal(size=(2, 4, 16, 24)).astype(np.float32)
    x[1, 2] *= 1e3  # a matrix's size is nobody else's business
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, P(None, "expert", "fsdp", "tensor")))
        y = jax.jit(lambda x: orthogonalize({path: x}, 5))(split)[path]
        assert y.sharding.spec == P(None, "expert", "fsdp", "tensor")
    wanted = np.stack([[newton_schulz(m.astype(np.float64), 5) for m in layer] for layer in x]) * math.sqrt(24 / 16)
    assert relative(np.asarray(y), wanted) < 1e-4
    assert np.all(np.linalg.svd(wanted / math.sqrt(24 / 16))[1] > 0.3)


def test_muon_takes_matrices_by_name():
    params = random_parameters(LORA)
    taken = {path for path in params if matrix_dims(path)}
    assert taken == {path for path in params if is_matrix(path)}
    for path in taken:  # every dim that is not layers or experts is of the matrix
        inputs, outputs = matrix_dims(path)
        lead = 2 if ".ffn." in path else 1
        assert sorted(dim % params[path].ndim for dim in (*inputs, *outputs)) == list(range(lead, params[path].ndim)), path


def test_every_linear_map_of_latent_attention_is_a_matrix():
    lora = config.Lora(targets=(config.LoraTarget(modules=("attention.*", "ffn.*_proj"), rank=2, alpha=4.0),))
    with jax.set_mesh(ONE):
        shapes = abstract(MISTRAL4, lora=lora)
    matrices = {path for path in shapes if matrix_dims(path)}
    parsed = {path: ParameterPath.parse(path) for path in shapes}
    assert matrices == {path for path, x in parsed.items() if not (x.is_norm or x.is_router or x.is_embedding or x.is_head)}
    for path in matrices:
        inputs, outputs = matrix_dims(path)
        lead = 2 if parsed[path].is_expert(MISTRAL4) else 1
        assert sorted(dim % shapes[path].ndim for dim in (*inputs, *outputs)) == list(range(lead, shapes[path].ndim)), path


@pytest.mark.parametrize("encoder", [VISION, ENCODER], ids=["vision", "audio"])
def test_every_linear_map_of_a_tower_is_a_matrix(encoder: config.Encoder) -> None:
    """Convolutions and the projector, which are not stacked, included; biases and norms are not."""
    with jax.set_mesh(ONE):
        shapes = abstract(MISTRAL4, encoder=encoder)
    parsed = {path: ParameterPath.parse(path) for path in shapes if ParameterPath.parse(path).is_tower}
    matrices = {path for path in parsed if matrix_dims(path)}
    assert matrices == {path for path, x in parsed.items() if x.leaf == "weight"}
    for path in matrices:
        inputs, outputs = matrix_dims(path)
        lead = int(".layers." in path)
        assert sorted(dim % shapes[path].ndim for dim in (*inputs, *outputs)) == list(range(lead, shapes[path].ndim)), path


def test_a_matrix_that_is_not_stacked_is_orthogonalized_whole() -> None:
    path = "vision.projector.in_proj.weight"
    x = np.random.default_rng(0).normal(size=(8, 24)).astype(np.float32)
    with jax.set_mesh(mesh_of(config.Mesh(fsdp=4, tensor=2))):
        split = jax.device_put(x, NamedSharding(mesh_of(config.Mesh(fsdp=4, tensor=2)), P(None, "fsdp")))
        y = jax.jit(lambda x: orthogonalize({path: x}, 5))(split)[path]
        assert y.sharding.spec == P(None, "fsdp")
    assert relative(np.asarray(y), newton_schulz(x.astype(np.float64), 5) * math.sqrt(3)) < 1e-4
