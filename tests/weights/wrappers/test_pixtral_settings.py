"""Settings of a vision tower survive the way to Mistral's own layout and back; what has no expression there is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_train.weights.wrappers import pixtral_settings, towers
from moe_train.weights.wrappers.classes import WRAPPERS
from tests.commands.wrapper import TEXT, VISION

MISTRAL3 = WRAPPERS["Mistral3ForConditionalGeneration"]
LLAVA = WRAPPERS["LlavaForConditionalGeneration"]
FIELDS: dict[str, Any] = {"vision_config": VISION, "image_token_index": 5}


def there(directory: Path, wrapper: Any, fields: dict[str, Any]) -> dict[str, Any]:
    settings = towers.settings_of(wrapper, fields, 16)
    assert isinstance(settings, towers.PixtralSettings)
    return pixtral_settings.to_native(fields, settings, directory, {"[IMG_BREAK]": 7}.get)


@pytest.mark.parametrize("wrapper", [MISTRAL3, LLAVA], ids=lambda row: row.model_type)
def test_there_and_back(wrapper: Any, tmp_path: Path) -> None:
    section = there(tmp_path, wrapper, FIELDS)
    assert (section["image_token_id"], section["image_break_token_id"], section["image_end_token_id"]) == (5, 7, -1)
    settings = towers.native_settings({"vision_encoder": section}, 16)
    assert settings == towers.settings_of(wrapper, FIELDS, 16)
    assert settings is not None
    fields = pixtral_settings.to_hugging_face(wrapper, {"vision_encoder": section}, settings, TEXT)
    assert fields["image_token_index"] == 5 and towers.settings_of(wrapper, fields, 16) == settings
    files = pixtral_settings.processor_files({"vision_encoder": section}, settings)
    assert files["processor_config.json"]["spatial_merge_size"] == (2 if wrapper is MISTRAL3 else 1)
    with pytest.raises(ValueError, match=r"ForConditionalGeneration has no text model of family mixtral"):
        mixtral = TEXT.model_copy(update={"family": "mixtral"})
        pixtral_settings.to_hugging_face(wrapper, {"vision_encoder": section}, settings, mixtral)


@pytest.mark.parametrize(
    "content",
    [
        {"preprocessor_config.json": {"size": {"longest_edge": 99}}},
        {"processor_config.json": {"image_processor": {"size": {"longest_edge": 99}}}},
        {"preprocessor_config.json": {"size": {"height": 3}}, "processor_config.json": {"size": {"longest_edge": 99}}},
    ],
)
def test_the_largest_image_is_the_processors(content: dict[str, Any], tmp_path: Path) -> None:
    for name, fields in content.items():
        (tmp_path / name).write_text(json.dumps(fields))
    assert there(tmp_path, MISTRAL3, FIELDS)["max_image_size"] == 99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config": VISION | {"hidden_act": "gelu"}}, "vision_config.hidden_act is 'gelu'.* only compute 'silu'"),
        ({"vision_feature_layer": -2}, "vision_feature_layer is -2"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy is 'default'"),
    ],
)
def test_what_readers_of_mistrals_own_layout_would_compute_otherwise_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        there(tmp_path, LLAVA, FIELDS | change)
