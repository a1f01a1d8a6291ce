"""Names and shapes of towers: defaults, projectors of every class, and files that do not agree with their config."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train.weights.wrappers import towers
from moe_train.weights.wrappers.classes import WRAPPERS
from tests.commands.wrapper import TOWER, VISION

MISTRAL3 = WRAPPERS["Mistral3ForConditionalGeneration"]
LLAVA = WRAPPERS["LlavaForConditionalGeneration"]
VOXTRAL = WRAPPERS["VoxtralForConditionalGeneration"]


def shapes(wrapper: Any, fields: dict[str, Any], text_dim: int = 16) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in towers.tower_tensors(towers.settings_of(wrapper, fields, text_dim))}


def test_a_pixtral_tower_with_and_without_a_merger() -> None:
    assert shapes(MISTRAL3, {"vision_config": VISION}) == TOWER
    plain = shapes(LLAVA, {"vision_config": VISION, "vision_feature_layer": [-2, -1]})
    assert plain.keys() - TOWER.keys() == {f"multi_modal_projector.linear_{i}.bias" for i in (1, 2)}
    assert TOWER.keys() - plain.keys() == {
        "multi_modal_projector.norm.weight",
        "multi_modal_projector.patch_merger.merging_layer.weight",
    }
    assert plain["multi_modal_projector.linear_1.weight"] == (16, 16)  # the outputs of two layers


def test_real_sizes_are_the_defaults() -> None:
    """FAMILY.md 1.1: the tower of Small 4 has 403,305,472 parameters, its projector 25,166,848 and the norm; 222 tensors."""
    real = shapes(MISTRAL3, {}, 4096)
    assert len(real) == 2 + 24 * 9 + 4
    total = 0
    for name, shape in real.items():
        size = 1
        for dim in shape:
            size *= dim
        total += size if name.startswith("vision_tower.") else 0
    assert total == 403_305_472
    audio = shapes(VOXTRAL, {"audio_config": {"d_model": 8, "encoder_layers": 1, "encoder_ffn_dim": 32}}, 16)
    assert audio["audio_tower.conv1.weight"] == (8, 128, 3) and audio["multi_modal_projector.linear_1.weight"] == (16, 32)
    assert "audio_tower.layers.0.self_attn.k_proj.bias" not in audio and len(audio) == 4 + 1 + 15 + 2 + 2


def test_every_vision_tensor_has_a_name_of_its_own_in_both_layouts() -> None:
    rows = towers.tower_tensors(towers.settings_of(LLAVA, {"vision_config": VISION}, 16))
    assert len({row.native for row in rows}) == len(rows) and all(row.native for row in rows)
    assert [row.name.split(".")[-2] for row in rows if row.heads] == ["q_proj", "k_proj"]


@pytest.mark.parametrize(
    ("wrapper", "fields", "message"),
    [
        (MISTRAL3, {"vision_config": 3}, "vision_config is 3, but Mistral3ForConditionalGeneration needs an object"),
        (
            LLAVA,
            {"vision_config": {"model_type": "clip_vision_model"}},
            "model_type is 'clip_vision_model'.* only towers of type pixtral",
        ),
        (MISTRAL3, {"vision_config": VISION | {"hidden_size": -1}}, "vision_config.hidden_size is -1: Input should be greater"),
        (VOXTRAL, {"audio_config": {"encoder_layers": "x"}}, "audio_config.num_hidden_layers is 'x'"),
    ],
)
def test_a_config_that_describes_no_tower_is_refused(wrapper: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        towers.settings_of(wrapper, fields, 16)


def test_files_that_do_not_agree_with_their_config_are_refused() -> None:
    name = "vision_tower.ln_pre.weight"
    towers.check_complete("base", TOWER, {**TOWER, f"{name}_scale_inv": ()})
    rest = {key: shape for key, shape in TOWER.items() if key != name}
    for stored, message in (
        ({}, r"base has no tensor of the tower and projector .*\(15, such as .*replace the config by that of the text model"),
        (rest, rf"base lacks {name}, .*\(1 tensors"),
        ({**TOWER, "vision_tower.transformer.layers.1.ffn_norm.weight": (8,)}, r"base has .*layers\.1.* not part of the tower"),
        ({**TOWER, name: (9,)}, rf"{name} has the shape \(9,\), but the config describes \(8,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            towers.check_complete("base", TOWER, stored)


def test_settings_of_mistrals_own_files() -> None:
    section = {key: value for key, value in VISION.items() if key not in ("model_type", "hidden_act")}
    assert towers.native_settings({}, 16) is None
    plain = towers.native_settings({"vision_encoder": section}, 16)
    assert plain is not None and plain.bias and not plain.merge and not plain.norm
    with pytest.raises(ValueError, match=r"vision_encoder\.patch_size is not stated; add it"):
        towers.native_settings({"vision_encoder": {**section, "patch_size": None}}, 16)
    with pytest.raises(ValueError, match=r"vision_encoder\.patch_size is 'x'"):
        towers.native_settings({"vision_encoder": {**section, "patch_size": "x"}}, 16)
