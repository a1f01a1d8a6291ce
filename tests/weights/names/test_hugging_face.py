"""The names of experts, and the layout that is detected from names."""

from __future__ import annotations

import pytest

from moe_train import config
from moe_train.weights import names
from tests.tiny import DEEPSEEK_V3, LATENT, MISTRAL4
from tests.weights.names.models import SMALL, attention


def test_the_names_of_the_experts_matrices() -> None:
    """w1 is the gate (silu), w3 goes up, w2 goes down, as Mixtral's paper and files have it."""
    body = "model.layers.1.block_sparse_moe"
    found = {piece.name: (piece.path, piece.lead) for piece in names.weight_pieces(SMALL) if piece.name.startswith(body)}
    assert found[f"{body}.gate.weight"] == ("stacks.0.layers.0.ffn.router.weight", (1,))
    for file, ours in {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.items():
        assert found[f"{body}.experts.2.{file}.weight"] == (f"stacks.0.layers.0.ffn.{ours}.weight", (1, 2))
    interleaved = SMALL.model_copy(update={"attention": attention(4, 2, 2, windows=(None, 4)), "num_layers": 4})
    (piece,) = (p for p in names.weight_pieces(interleaved) if p.name == "model.layers.3.input_layernorm.weight")
    assert (piece.path, piece.lead) == ("stacks.0.layers.1.attention_norm.scale", (1,))


@pytest.mark.parametrize(("model", "experts"), [(SMALL, "block_sparse_moe"), (MISTRAL4, "fused"), (DEEPSEEK_V3, "mlp")])
def test_the_layout_that_is_written_is_detected(model: config.Model, experts: config.HuggingFaceExperts) -> None:
    layout = names.hugging_face_of(model)
    assert layout == names.hugging_face(experts=experts)
    assert names.detect_hugging_face([piece.name for piece in names.weight_pieces(model)]) == layout


def test_names_and_shapes_of_latent_attention() -> None:
    shapes = {piece.name: piece.shape for piece in names.weight_pieces(MISTRAL4)}
    attention = "model.layers.1.self_attn."
    assert shapes[f"{attention}q_b_proj.weight"] == (4 * (10 + 8), 12)
    assert shapes[f"{attention}kv_a_proj_with_mqa.weight"] == (14 + 8, 32)
    assert shapes[f"{attention}kv_b_proj.weight"] == (4 * (10 + 6), 14)
    assert shapes[f"{attention}o_proj.weight"] == (32, 4 * 6)
    assert shapes["model.layers.1.mlp.shared_experts.down_proj.weight"] == (32, 2 * 16)
    assert shapes["model.layers.1.mlp.experts.gate_up_proj"] == (8, 2 * 16, 32)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (48, 32)
    direct = MISTRAL4.model_copy(update={"attention": LATENT.model_copy(update={"q_lora_rank": None})})
    without = {piece.name: piece.shape for piece in names.weight_pieces(direct)}
    assert without["model.layers.0.self_attn.q_proj.weight"] == (4 * 18, 32)
    assert not any("q_a" in name or "q_b" in name for name in without)
