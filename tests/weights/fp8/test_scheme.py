"""Which weights of an export are quantized, with which scales, and what the config states of it."""

from __future__ import annotations

import pytest

from moe_train import config
from moe_train.weights import names
from moe_train.weights.fp8 import scheme
from tests.tiny import DEEPSEEK_V3, MISTRAL4
from tests.weights.fp8.models import WIDE, WIDE_FUSED, WIDE_LATENT


def test_a_text_model_in_a_wrapper_is_quantized_as_released() -> None:
    alone = names.weight_pieces(WIDE)
    wrapped = names.weight_pieces(WIDE, names.WRAPPED)
    assert scheme.hugging_face_scheme(alone).block == (128, 128) and scheme.hugging_face_scheme(wrapped).block is None
    section = scheme.hugging_face_section(wrapped, scheme.hugging_face_scheme(wrapped))
    assert section["weight_block_size"] is None
    assert {"model.vision_tower", "model.multi_modal_projector", "lm_head"} <= set(section["modules_to_not_convert"])
    section = scheme.hugging_face_section(alone, scheme.hugging_face_scheme(alone))
    assert not any("vision" in name for name in section["modules_to_not_convert"])


def test_matrices_that_blocks_do_not_divide_stay_bfloat16_with_what_vllm_joins_them_to() -> None:
    pieces = names.weight_pieces(WIDE_LATENT)
    blocks = scheme.hugging_face_scheme(pieces)
    assert blocks.block == (128, 128)
    layers = {f"model.layers.{layer}.self_attn.{leaf}" for layer in (0, 1) for leaf in ("q_a_proj", "kv_a_proj_with_mqa")}
    assert blocks.unquantized == {f"{module}.weight" for module in layers}
    section = scheme.hugging_face_section(pieces, blocks)
    assert set(section["modules_to_not_convert"]) == {"lm_head", "model.layers.1.mlp.gate", *layers}
    # Experts that blocks do not divide are left out as the one module that they are.
    ffn = WIDE.ffn.model_copy(update={"ffn_dim": 64, "num_experts": 1})
    narrow = names.weight_pieces(WIDE.model_copy(update={"ffn": ffn}))
    section = scheme.hugging_face_section(narrow, scheme.hugging_face_scheme(narrow))
    assert section["weight_block_size"] == [128, 128]
    assert section["modules_to_not_convert"][-1] == "model.layers.0.block_sparse_moe.experts"


@pytest.mark.parametrize("model", [MISTRAL4, DEEPSEEK_V3], ids=["fused", "separate"])
def test_a_model_that_blocks_do_not_divide_has_one_scale_per_tensor(model: config.Model) -> None:
    pieces = names.weight_pieces(model)
    per_tensor = scheme.hugging_face_scheme(pieces)
    assert per_tensor == scheme.Fp8Scheme(None, "weight_scale_inv")
    shapes = {per_tensor.scale_name(piece.name): per_tensor.scale_shape(piece) for piece in pieces if per_tensor.quantizes(piece)}
    assert shapes["model.layers.0.self_attn.o_proj.weight_scale_inv"] == ()
    if model is MISTRAL4:
        assert shapes["model.layers.1.mlp.experts.gate_up_proj_scale_inv"] == (8, 2, 1)
        assert shapes["model.layers.1.mlp.experts.down_proj_scale_inv"] == (8, 1, 1)
    assert scheme.MISTRAL_SCHEME.scale_name("layers.0.attention.wo.weight") == "layers.0.attention.wo.qscale_weight"


def test_blocks_of_an_expert_are_never_taken_for_the_scales_of_its_halves() -> None:
    """A grid of 2 x 1 stands for gate and up, so an expert of 128 x 128 has no blocks."""
    ffn = WIDE_FUSED.ffn.model_copy(update={"ffn_dim": 128, "num_experts": 1})
    chosen = scheme.hugging_face_scheme(names.weight_pieces(WIDE_FUSED.model_copy(update={"ffn": ffn})))
    assert chosen.block == (128, 128)
    assert {f"model.layers.1.mlp.experts.{leaf}_proj" for leaf in ("gate_up", "down")} <= chosen.unquantized
