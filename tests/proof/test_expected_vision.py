"""The second reader's tensors of a trained tower have the names, shapes and order of the writer's, in both layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.proof.expected_vision import vision_tensors
from moe_train.weights import external
from moe_train.weights.wrappers import vision_pieces
from moe_train.weights.wrappers.carry import carry
from tests.commands.wrapper import TEXT, save_wrapper
from tests.random_parameters import random_parameters
from tests.tiny import ONE


@pytest.mark.parametrize("layout", ["hf", "mistral"])
def test_tensors_are_those_of_the_writer(layout: Literal["hf", "mistral"], tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        save_wrapper(tmp_path / "base", random_parameters(TEXT))
    carried = external.open_external_weights(tmp_path / "base").carried
    assert carried is not None
    encoder = external.read_encoder(tmp_path / "base", config.VisionEncoder)
    written = carry(tmp_path / "base", carried, layout, TEXT, None, None).tensors
    expected = {tensor.name: tensor for tensor in vision_tensors(layout, encoder, TEXT.model_dim)}
    assert expected.keys() == written.keys()
    for piece in vision_pieces.pieces_of(carried, TEXT):
        values = piece.from_file(carried.tensors[piece.name].read)
        (tensor,) = (x for x in expected.values() if (x.parts[0].path, x.parts[0].lead) == (piece.path, piece.lead))
        assert tensor.shape == written[tensor.name].base.shape
        assert np.array_equal(tensor.parts[0].to_file(values).reshape(tensor.shape), written[tensor.name].read()), tensor.name


def test_only_trained_tensors_are_expected() -> None:
    encoder = config.VisionEncoder(
        tower_dim=8, ffn_dim=12, num_layers=2, num_heads=2, patch_size=2, max_image_size=8, projector_bias=True
    )
    trained = {"vision.projector.in_proj.bias", "vision.tower.layers.ffn_norm.scale"}
    assert [tensor.name for tensor in vision_tensors("hf", encoder, 16, trained)] == [
        "vision_tower.transformer.layers.0.ffn_norm.weight",
        "vision_tower.transformer.layers.1.ffn_norm.weight",
        "multi_modal_projector.linear_1.bias",
    ]
