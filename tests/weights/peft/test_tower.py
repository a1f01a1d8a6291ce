"""The part of adapter_config.json on a tower: whole names, which come before the short ones of a text model."""

from __future__ import annotations

import re

from moe_train import config
from moe_train.weights.peft.tower import adaptable_tower, saved_tower, tower_adapters, tower_of, with_tower
from moe_train.weights.serve import AdapterShape
from tests.tiny import MINISTRAL

ENCODER = config.VisionEncoder(
    tower_dim=8, ffn_dim=12, num_layers=11, num_heads=2, patch_size=2, max_image_size=8, projector_bias=True
)
LORA = config.Lora(
    targets=(config.LoraTarget(modules=("attention.q_proj",), rank=2, alpha=3.0),),
    train=("vision.projector.in_proj", "vision.tower.layers.ffn_norm"),
)
Q_PROJ = "vision.tower.layers.attention.q_proj"


def test_settings_name_modules_of_the_tower_in_whole() -> None:
    shapes = tower_adapters({"stacks.0.layers.0.attention.q_proj": AdapterShape(2, 3.0), Q_PROJ: AdapterShape(4, 2.5)})
    assert shapes.keys() == {Q_PROJ}
    tower = tower_of(ENCODER, MINISTRAL, LORA, shapes)
    settings = {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {}, "modules_to_save": None}
    changed = with_tower(settings, tower)
    name = "model.vision_tower.transformer.layers.10.attention.q_proj"
    assert re.fullmatch(changed["target_modules"], name)
    assert re.fullmatch(changed["target_modules"], "model.language_model.layers.0.self_attn.q_proj")
    assert not re.fullmatch(changed["target_modules"], name.replace("q_proj", "k_proj"))
    first = next(rank for pattern, rank in changed["rank_pattern"].items() if re.match(rf"(.*\.)?({pattern})$", name))
    assert first == 4 and list(changed["alpha_pattern"].values()) == [2.5]
    saved = [f"model.vision_tower.transformer.layers.{layer}.ffn_norm" for layer in range(11)]
    assert changed["modules_to_save"] == sorted([*saved, "model.multi_modal_projector.linear_1"])


def test_every_linear_map_can_have_an_adapter_and_every_weight_can_be_saved() -> None:
    names = [piece.name for piece in adaptable_tower(ENCODER, MINISTRAL)]
    assert len(names) == 2 * (1 + 2 + 11 * 7) and not [name for name in names if "norm" in name or "bias" in name]
    kernel = [piece.shape for piece in adaptable_tower(ENCODER, MINISTRAL) if "patch_conv" in piece.name]
    assert kernel == [(1, 3, 2, 2), (8, 1, 1, 1)]
    assert len(saved_tower(ENCODER, MINISTRAL)) == 2 + 4 + 11 * 9
