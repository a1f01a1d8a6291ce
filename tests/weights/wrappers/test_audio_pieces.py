"""An audio tower of files as weights of our model, in both layouts, and towers that are refused."""

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
from moe_train.weights.names import mistral_of, weight_pieces
from moe_train.weights.wrappers.carry import carry
from tests.commands.audio_wrapper import ENCODER, MODEL, save_audio_wrapper
from tests.random_parameters import random_parameters
from tests.tiny import ONE

LAYER = "audio_tower.layers.0."


@pytest.fixture
def base(tmp_path: Path) -> Path:
    with jax.set_mesh(ONE):
        save_audio_wrapper(tmp_path / "base", random_parameters(MODEL))
    return tmp_path / "base"


def loaded(path: Path) -> dict[str, np.ndarray]:
    shapes = parameters(abstract_model(MODEL, encoder=ENCODER))[1]
    tower = {name: like for name, like in shapes.items() if ParameterPath.parse(name).is_tower}
    return {name: np.asarray(x) for name, x in external.load_external_parameters(path, tower).items()}


def test_every_tensor_has_its_place(base: Path) -> None:
    assert external.read_encoder(base, config.AudioEncoder) == external.find_encoder(base) == ENCODER
    files = safetensors.numpy.load_file(base / "model.safetensors")
    with jax.set_mesh(ONE):
        ours = loaded(base)
    assert len(ours) == 24
    assert np.array_equal(ours["audio.tower.positions"], files["audio_tower.embed_positions.weight"])
    conv = files["audio_tower.conv2.weight"]
    assert np.array_equal(ours["audio.tower.second_conv.weight"].reshape(3, 16, 16), conv.transpose(2, 1, 0))
    assert np.array_equal(ours["audio.tower.layers.attention.q_proj.bias"][0], files[f"{LAYER}self_attn.q_proj.bias"].reshape(2, 8))
    o = files[f"{LAYER}self_attn.out_proj.weight"]
    assert np.array_equal(ours["audio.tower.layers.attention.o_proj.weight"][0], o.reshape(16, 2, 8).transpose(1, 2, 0))
    assert np.array_equal(ours["audio.projector.in_proj.weight"], files["multi_modal_projector.linear_1.weight"].T)


def test_mistrals_own_layout_holds_the_same_tower(base: Path, tmp_path: Path) -> None:
    carried = external.open_external_weights(base).carried
    assert carried is not None
    wrapping = carry(base, carried, "mistral", MODEL, None, None)
    tensors = {name: np.ascontiguousarray(tensor.read()) for name, tensor in wrapping.tensors.items()}
    with jax.set_mesh(ONE):
        text = random_parameters(MODEL)
        for piece in weight_pieces(MODEL, mistral_of(MODEL, with_audio=True)):
            tensors[piece.name] = np.ascontiguousarray(piece.to_file(np.asarray(text[piece.path])[piece.lead]))
        native = tmp_path / "native"
        native.mkdir()
        safetensors.numpy.save_file(tensors, native / "consolidated.safetensors")
        a = MODEL.attention
        assert isinstance(a, config.GroupedQueryAttention)
        params = {"dim": MODEL.model_dim, "n_layers": MODEL.num_layers, "head_dim": a.head_dim, "hidden_dim": MODEL.ffn.ffn_dim}
        params |= {"n_heads": a.num_heads, "n_kv_heads": a.num_kv_heads, "norm_eps": MODEL.norm_eps, "vocab_size": MODEL.vocab_size}
        (native / "params.json").write_text(json.dumps(wrapping.around(params | {"rope_theta": 1e6})))
        assert external.read_encoder(native, config.AudioEncoder) == ENCODER
        ours, theirs = loaded(base), loaded(native)
    for name, x in ours.items():
        assert np.array_equal(x, theirs[name]), name
