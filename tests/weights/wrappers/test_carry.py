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
from moe_train.weights.wrappers import towers, whisper
from moe_train.weights.wrappers.carry import CarriedTensor, carry, processor_files
from moe_train.weights.wrappers.classes import WRAPPERS
from tests.commands.wrapper import TEXT, TOWER, VISION

MISTRAL3 = WRAPPERS["Mistral3ForConditionalGeneration"]
VOXTRAL = WRAPPERS["VoxtralForConditionalGeneration"]


class Tensor:
    """A tensor in memory, as a file would have it."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array, self.shape, self.dtype, self.file = name, array, array.shape, array.dtype, "file"

    def read(self, index: Any = ()) -> np.ndarray:
        return self.array[index]


def tensors(shapes: dict[str, tuple[int, ...]], dtype: Any = np.float32) -> dict[str, Any]:
    return {name: Tensor(name, np.ones(shape, dtype)) for name, shape in shapes.items()}


def vision(fields: dict[str, Any] | None = None, dtype: Any = np.float32) -> Carried:
    stated = {"vision_config": VISION, **(fields or {})}
    return Carried("vision tower", "hf", MISTRAL3, stated, towers.settings_of(MISTRAL3, stated, 16), tensors(TOWER, dtype))


AUDIO = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_mel_bins": 4,
    "max_source_positions": 6,
}


def audio(path: Path, layout: Any = "hf", positions: np.ndarray | None = None, **fields: Any) -> Carried:
    """A tiny Voxtral's tower in Hugging Face's layout, or the same by way of an export in Mistral's own."""
    stated = {"audio_config": AUDIO, "audio_token_id": 24} | fields
    settings = towers.settings_of(VOXTRAL, stated, 16)
    stored = tensors({row.name: row.shape for row in towers.tower_tensors(settings)})
    table = whisper.Positions(whisper.settings_of(AUDIO, 16)).read()
    stored[whisper.POSITIONS] = Tensor(whisper.POSITIONS, table if positions is None else positions)
    of_hf = Carried("audio tower", "hf", VOXTRAL, stated, settings, stored)
    if layout == "hf":
        return of_hf
    wrapping = carry(path, of_hf, "mistral", TEXT, None, None)
    native = {name: Tensor(name, tensor.read()) for name, tensor in wrapping.tensors.items()}
    sizes = towers.native_settings(wrapping.fields, 16)
    assert sizes is not None
    return Carried("audio tower", "mistral", None, wrapping.fields, sizes, native)


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


def test_a_quantized_tower_is_dequantized_for_readers_that_load_it_unquantized(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "vision_tower.transformer.layers.0.attention.q_proj.weight"
    codes = np.arange(64, dtype=np.float32).reshape(8, 8).astype(ml_dtypes.float8_e4m3fn)
    plain = vision()
    of_tower = {**plain.tensors, name: Tensor(name, codes), f"{name}_scale_inv": Tensor("scale", np.full((), 0.5, np.float32))}
    base = plain._replace(tensors=of_tower)
    native = carry(tmp_path, base, "mistral", TEXT, None, None)
    assert "1 tensors of the vision tower" in caplog.text and not native.is_quantized
    assert len(native.tensors) == len(plain.tensors) and not any("scale" in name for name in native.tensors)
    rows = native.tensors["vision_encoder.transformer.layers.0.attention.wq.weight"].read()
    assert rows.dtype.name == "bfloat16"
    # Heads of 4 rows, in which the second half of a pair is 2 rows away, or the next one.
    expected = (codes.astype(np.float32) * 0.5).reshape(2, 2, 2, 8).transpose(0, 2, 1, 3).reshape(8, 8)
    assert np.array_equal(rows.astype(np.float32), expected)
    with pytest.raises(ValueError, match="has no scale"):
        carry(tmp_path, plain._replace(tensors={**plain.tensors, name: Tensor(name, codes)}), "mistral", TEXT, None, None)


@pytest.mark.parametrize("layout", ["hf", "mistral"])
def test_an_audio_tower_keeps_its_bytes_in_both_layouts(layout: Any, tmp_path: Path) -> None:
    base = audio(tmp_path, layout)
    same = carry(tmp_path, base, layout, TEXT, None, None)
    assert same.tensors.keys() == base.tensors.keys() and not any(tensor.heads for tensor in same.tensors.values())
    other = carry(tmp_path, base, "mistral" if layout == "hf" else "hf", TEXT, None, None)
    computed = {whisper.POSITIONS} if layout == "mistral" else set()
    assert {name for name, tensor in other.tensors.items() if not tensor.base_name} == computed
    native = same if layout == "mistral" else other
    assert native.text_layout == names.mistral_of(TEXT, with_audio=True)
    assert native.fields["multimodal"]["whisper_model_args"]["downsample_args"] == {"downsample_factor": 4}
    again = audio(tmp_path, "mistral")
    assert carry(tmp_path, again, "hf", TEXT, None, None).fields["audio_config"].items() >= AUDIO.items()


def test_an_audio_tower_that_no_reader_of_the_other_layout_computes_is_refused(tmp_path: Path) -> None:
    nan = np.full((6, 8), np.nan, np.float32)
    for base, layout, message in (
        (audio(tmp_path, positions=np.zeros((6, 8), np.float32)), "mistral", r"embed_positions\.weight differs by up to 1 from"),
        (audio(tmp_path, positions=nan), "mistral", "differs by up to nan"),
        (audio(tmp_path, audio_token_id=7), "mistral", "audio_token_id is 7 in its config.json.*only compute 24"),
        (audio(tmp_path, audio_config=AUDIO | {"activation_function": "relu"}), "mistral", "activation_function is 'relu'"),
        (audio(tmp_path, audio_config=AUDIO | {"intermediate_size": 33}), "mistral", "intermediate_size 33 is no multiple"),
    ):
        with pytest.raises(ValueError, match=rf"{message}.*use --format hf, or --text-only"):
            carry(tmp_path, base, layout, TEXT, None, None)
    tied = TEXT.model_copy(update={"tie_embeddings": True})
    with pytest.raises(ValueError, match=r"has a head of its own; use --format mistral, or --text-only"):
        carry(tmp_path, audio(tmp_path, "mistral"), "hf", tied, None, None)
    rounded = whisper.Positions(whisper.settings_of(AUDIO, 16)).read().astype(ml_dtypes.bfloat16)
    assert carry(tmp_path, audio(tmp_path, positions=rounded), "mistral", TEXT, None, None).tensors


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
