"""What an export has of its multimodal base, by layout; what no layout can express is refused with a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from moe_train.weights import names
from moe_train.weights.on_disk import Carried
from moe_train.weights.wrappers import towers
from moe_train.weights.wrappers.carry import CarriedTensor, carry, processor_files
from moe_train.weights.wrappers.classes import WRAPPERS
from tests.commands.wrapper import TEXT, TOWER, VISION

MISTRAL3 = WRAPPERS["Mistral3ForConditionalGeneration"]
VOXTRAL = WRAPPERS["VoxtralForConditionalGeneration"]


class Tensor:
    """A tensor in memory, as a file would have it."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array, self.shape, self.dtype = name, array, array.shape, array.dtype

    def read(self, index: Any = ()) -> np.ndarray:
        return self.array[index]


def tensors(shapes: dict[str, tuple[int, ...]], dtype: Any = np.float32) -> dict[str, Any]:
    return {name: Tensor(name, np.ones(shape, dtype)) for name, shape in shapes.items()}


def vision(fields: dict[str, Any] | None = None, dtype: Any = np.float32) -> Carried:
    stated = {"vision_config": VISION, **(fields or {})}
    return Carried("vision tower", "hf", MISTRAL3, stated, towers.settings_of(MISTRAL3, stated, 16), tensors(TOWER, dtype))


def audio_in(layout: Any) -> Carried:
    fields = {"multimodal": {"whisper_model_args": {}}} if layout == "mistral" else {"audio_config": {}}
    name = "mm_whisper_embeddings.whisper_encoder.conv_layers.0.weight" if layout == "mistral" else "audio_tower.conv1.weight"
    return Carried("audio tower", layout, VOXTRAL if layout == "hf" else None, fields, None, tensors({name: (2, 3, 3)}))


def test_the_settings_of_the_export_surround_those_of_its_text(tmp_path: Path) -> None:
    base = vision({"dtype": "float32", "quantization_config": {"quant_method": "fp8"}, "image_token_id": 5})
    wrapping = carry(tmp_path, base, "hf", TEXT, None, None)
    text = {
        "architectures": ["X"],
        "model_type": "mistral",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    fields = wrapping.around(text)
    assert fields["architectures"] == [MISTRAL3.architecture] and fields["image_token_id"] == 5 and fields["dtype"] == "bfloat16"
    assert "quantization_config" not in fields and "architectures" not in fields["text_config"]
    assert wrapping.text_layout == names.wrapped_in_files(TEXT) and wrapping.nbytes == base.nbytes


def test_a_quantized_tower_keeps_its_section_and_the_text_is_excluded_from_it(tmp_path: Path) -> None:
    section = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}
    base = vision({"quantization_config": section}, ml_dtypes.float8_e4m3fn)
    excluded = carry(tmp_path, base, "hf", TEXT, None, None).fields["quantization_config"]["modules_to_not_convert"]
    assert excluded == ["language_model", "lm_head", "model.language_model"]
    with pytest.raises(ValueError, match=r"is quantized \(FP8\).*--format hf, or --text-only"):
        carry(tmp_path, base, "mistral", TEXT, None, None)


@pytest.mark.parametrize(("layout", "to"), [("hf", "mistral"), ("mistral", "hf")])
def test_an_audio_tower_stays_in_its_layout(layout: Any, to: Any, tmp_path: Path) -> None:
    base = audio_in(layout)
    assert carry(tmp_path, base, layout, TEXT, None, None).tensors.keys() == base.tensors.keys()
    if layout == "mistral":
        assert carry(tmp_path, base, layout, TEXT, None, None).text_layout == names.mistral_of(TEXT, with_audio=True)
    with pytest.raises(ValueError, match=rf"describes it by other tensors and keys.*use --format {layout}, or --text-only"):
        carry(tmp_path, base, to, TEXT, None, None)


def test_rows_change_places_within_heads_and_back() -> None:
    array = np.arange(16.0).reshape(8, 2)
    native = CarriedTensor("x", "x", Tensor("x", array), 2, to_native=True).read()
    assert [int(row[0]) // 2 for row in native] == [0, 2, 1, 3, 4, 6, 5, 7]
    assert np.array_equal(CarriedTensor("x", "x", Tensor("x", native), 2, to_native=False).read(), array)


def test_files_of_the_processor(tmp_path: Path) -> None:
    for name in ("preprocessor_config.json", "processor_config.json", "generation_config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "x"}))
    assert sorted(processor_files(tmp_path, "y")) == ["preprocessor_config.json", "processor_config.json"]
    assert "chat_template.json" in processor_files(tmp_path, "x")
