"""Adapters of a tower have the shapes of PEFT's: matrices of linear maps, kernels of convolutions."""

from __future__ import annotations

from moe_train import config
from moe_train.weights.wrappers import tower_pieces
from tests.commands.audio_wrapper import ENCODER, MODEL
from tests.tiny import MINISTRAL

VISION = config.VisionEncoder(tower_dim=8, ffn_dim=12, num_layers=1, num_heads=2, patch_size=2, max_image_size=8)


def test_kernels_have_as_many_positions_as_the_base() -> None:
    of_pictures = tower_pieces.adapter_pieces(VISION, MINISTRAL, {"vision.tower.patch_proj": 3})
    assert [piece.shape for piece in of_pictures] == [(3, 3, 2, 2), (8, 3, 1, 1)]
    of_sound = tower_pieces.adapter_pieces(ENCODER, MODEL, {"audio.tower.first_conv": 3, "audio.projector.in_proj": 2})
    width = MODEL.model_dim
    assert [piece.shape for piece in of_sound] == [(3, 8, 3), (16, 3, 1), (2, 64), (width, 2)]
    assert [piece.internal_shape for piece in of_sound] == [(24, 3), (3, 16), (64, 2), (2, width)]


def test_names_in_memory_are_those_of_the_wrapper() -> None:
    names = {piece.name for piece in tower_pieces.pieces_in_memory(ENCODER, MODEL)}
    assert "model.audio_tower.layers.0.self_attn.q_proj.bias" in names and "model.multi_modal_projector.linear_2.weight" in names
