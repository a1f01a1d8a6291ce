"""A vision tower of files as weights of our model, in both layouts, and towers that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from moe_train import config
from moe_train.model.parameters import parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.transformer import abstract_model
from moe_train.weights import external
from moe_train.weights.names import weight_pieces
from moe_train.weights.names.mistral import MISTRAL
from moe_train.weights.wrappers.carry import carry
from tests.commands.wrapper import LAYER, TEXT, TOWER, save_wrapper
from tests.random_parameters import random_parameters
from tests.tiny import ONE

ENCODER = config.VisionEncoder(
    tower_dim=8, ffn_dim=12, num_layers=1, num_heads=2, patch_size=2, max_image_size=8, merge_size=2, projector_norm=True,
    projector_norm_eps=TEXT.norm_eps,
)  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    with jax.set_mesh(ONE):
        save_wrapper(tmp_path / "base", random_parameters(TEXT))
    return tmp_path / "base"


def loaded(path: Path, encoder: config.VisionEncoder) -> dict[str, np.ndarray]:
    shapes = parameters(abstract_model(TEXT, encoder=encoder))[1]
    tower = {name: like for name, like in shapes.items() if ParameterPath.parse(name).is_vision}
    return {name: np.asarray(x) for name, x in external.load_external_parameters(path, tower).items()}


def test_every_tensor_has_its_place(base: Path) -> None:
    assert external.read_encoder(base, config.VisionEncoder) == external.find_encoder(base) == ENCODER
    files = safetensors.numpy.load_file(base / "model.safetensors")
    with jax.set_mesh(ONE):
        ours = loaded(base, ENCODER)
    assert len(ours) == len(TOWER)
    assert np.array_equal(ours["vision.tower.patch_proj.weight"], files["vision_tower.patch_conv.weight"].reshape(8, 12).T)
    q = files[f"{LAYER}attention.q_proj.weight"]
    assert np.array_equal(ours["vision.tower.layers.attention.q_proj.weight"][0], q.reshape(2, 4, 8).transpose(2, 0, 1))
    o = files[f"{LAYER}attention.o_proj.weight"]
    assert np.array_equal(ours["vision.tower.layers.attention.o_proj.weight"][0], o.reshape(8, 2, 4).transpose(1, 2, 0))
    merger = files["multi_modal_projector.patch_merger.merging_layer.weight"]
    assert np.array_equal(ours["vision.projector.merge_proj.weight"], merger.T)
    assert np.array_equal(ours["vision.projector.norm.scale"], files["multi_modal_projector.norm.weight"])


def test_mistrals_own_layout_holds_the_same_tower(base: Path, tmp_path: Path) -> None:
    carried = external.open_external_weights(base).carried
    assert carried is not None
    wrapping = carry(base, carried, "mistral", TEXT, None, None)
    tensors = {name: np.ascontiguousarray(tensor.read()) for name, tensor in wrapping.tensors.items()}
    with jax.set_mesh(ONE):
        text = random_parameters(TEXT)
        for piece in weight_pieces(TEXT, MISTRAL):
            tensors[piece.name] = np.ascontiguousarray(piece.to_file(np.asarray(text[piece.path])[piece.lead]))
        native = tmp_path / "native"
        native.mkdir()
        safetensors.numpy.save_file(tensors, native / "consolidated.safetensors")
        a = TEXT.attention
        assert isinstance(a, config.GroupedQueryAttention)
        params = {"dim": TEXT.model_dim, "n_layers": TEXT.num_layers, "head_dim": a.head_dim, "hidden_dim": TEXT.ffn.ffn_dim}
        params |= {"n_heads": a.num_heads, "n_kv_heads": a.num_kv_heads, "norm_eps": TEXT.norm_eps, "vocab_size": TEXT.vocab_size}
        (native / "params.json").write_text(json.dumps(wrapping.around(params | {"rope_theta": 1e6})))
        encoder = external.read_encoder(native, config.VisionEncoder)
        assert encoder == ENCODER.model_copy(update={"projector_norm_eps": 1e-5})
        ours, theirs = loaded(base, ENCODER), loaded(native, encoder)
    for name, x in ours.items():
        assert np.array_equal(x, theirs[name]), name
