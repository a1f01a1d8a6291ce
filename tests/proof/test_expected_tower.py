"""The second reader's tensors of a trained tower have the names, shapes and order of the writer's, in both layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.proof.carried_names import POSITIONS
from moe_train.proof.expected_tower import read_encoder, tower_tensors
from moe_train.weights import external
from moe_train.weights.wrappers import encoders
from moe_train.weights.wrappers.carry import carry
from tests.commands import audio_wrapper, wrapper
from tests.random_parameters import random_parameters
from tests.tiny import ONE


@pytest.mark.parametrize("layout", ["hf", "mistral"])
@pytest.mark.parametrize("kind", ["vision", "audio"])
def test_tensors_are_those_of_the_writer(kind: str, layout: Literal["hf", "mistral"], tmp_path: Path) -> None:
    model = audio_wrapper.MODEL if kind == "audio" else wrapper.TEXT
    save = audio_wrapper.save_audio_wrapper if kind == "audio" else wrapper.save_wrapper
    with jax.set_mesh(ONE):
        save(tmp_path / "base", random_parameters(model))
    carried = external.open_external_weights(tmp_path / "base").carried
    encoder = external.find_encoder(tmp_path / "base")
    assert carried is not None and encoder is not None
    assert read_encoder(encoder.model_dump(mode="json")) == encoder
    written = carry(tmp_path / "base", carried, layout, model, None, None).tensors
    expected = {tensor.name: tensor for tensor in tower_tensors(layout, encoder, model.model_dim)}
    assert expected.keys() == written.keys() - {POSITIONS}
    stored = encoders.tensors_of(carried)
    for piece in encoders.pieces_of(carried, model):
        if piece.name == POSITIONS:
            continue
        values = piece.from_file(stored[piece.name].read)
        (tensor,) = (x for x in expected.values() if (x.parts[0].path, x.parts[0].lead) == (piece.path, piece.lead))
        assert tensor.shape == written[tensor.name].base.shape
        assert np.array_equal(tensor.parts[0].to_file(values).reshape(tensor.shape), written[tensor.name].read()), tensor.name


def test_only_trained_tensors_are_expected() -> None:
    encoder = config.VisionEncoder(
        tower_dim=8, ffn_dim=12, num_layers=2, num_heads=2, patch_size=2, max_image_size=8, projector_bias=True
    )
    trained = {"vision.projector.in_proj.bias", "vision.tower.layers.ffn_norm.scale"}
    assert [tensor.name for tensor in tower_tensors("hf", encoder, 16, trained)] == [
        "vision_tower.transformer.layers.0.ffn_norm.weight",
        "vision_tower.transformer.layers.1.ffn_norm.weight",
        "multi_modal_projector.linear_1.bias",
    ]
