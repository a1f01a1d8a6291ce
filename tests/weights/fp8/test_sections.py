"""What configs state about FP8: every spelling is understood, and anything else is refused with what is supported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_train.weights.fp8 import sections
from tests.weights.fp8.files import COMPRESSED, HF_BLOCK, HF_TENSOR, NATIVE

LARGE_3 = json.loads(json.dumps(COMPRESSED).replace("[4, 4]", "[128, 128]"))
ONE_GROUP = COMPRESSED["config_groups"]["FP8_BLOCK"]


def weights(**change: Any) -> dict[str, Any]:
    """The section of compressed-tensors with other settings for its weights."""
    return COMPRESSED | {"config_groups": {"g": ONE_GROUP | {"weights": ONE_GROUP["weights"] | change}}}


@pytest.mark.parametrize(
    ("fields", "granularity", "block"),
    [
        ({"quantization_config": HF_TENSOR}, "tensor", (128, 128)),
        ({"quantization_config": HF_BLOCK}, "block", (4, 4)),
        ({"quantization_config": {"quant_method": "fp8"}}, None, (128, 128)),
        ({"quantization_config": LARGE_3}, "block", (128, 128)),
        ({"quantization_config": weights(strategy="channel", block_structure=None)}, "channel", (128, 128)),
        ({"quantization": NATIVE}, None, (128, 128)),
        ({"quantization": NATIVE | {"qscheme_act": "NO_SCALES"}}, None, (128, 128)),
        ({"quantization": LARGE_3 | {"quant_method": "compressed_tensors"}}, "block", (128, 128)),
        ({"text_config": {"quantization_config": HF_BLOCK}}, "block", (4, 4)),
        ({"quantization_config": HF_BLOCK, "text_config": {"quantization_config": HF_BLOCK}}, "block", (4, 4)),
    ],
)
def test_every_spelling_is_understood(fields: dict[str, Any], granularity: str | None, block: tuple[int, int]) -> None:
    section = sections.find_section(fields, "f")
    assert section is not None and section.granularity == granularity and section.block == block
    assert section.file.startswith("f: quantization")


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({}, "bfloat16"),
        ({"dtype": "float32"}, "float32"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16", "text_config": {"dtype": "float16"}}, "float16"),
    ],
)
def test_values_are_rounded_to_the_dtype_of_the_model(fields: dict[str, Any], dtype: str) -> None:
    section = sections.find_section({"quantization_config": HF_BLOCK, **fields})
    assert section is not None and section.dtype == dtype


@pytest.mark.parametrize("section", [None, {}])
def test_a_file_may_state_no_quantization(section: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    assert sections.section_of_folder(tmp_path / "config.json") is None
    assert sections.section_of_folder(tmp_path / "params.json") is None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, r"quant_method is 'awq', which is not supported; supported is FP8"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method is 'bitsandbytes'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_method is 'modelopt'"),
        (COMPRESSED | {"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized'; supported: 'float-quantized'"),
        (COMPRESSED | {"transform_config": {"u": 1}}, "transform_config is"),
        (weights(num_bits=4), "num_bits is 4; supported: 8"),
        (weights(strategy="tensor_group"), "strategy is 'tensor_group'"),
        (weights(symmetric=False), "symmetric is False"),
        (weights(block_structure=[0, 4]), r"block_structure is \[0, 4\]; it has to be two positive"),
        (
            COMPRESSED | {"config_groups": {"a": ONE_GROUP, "b": weights()["config_groups"]["g"] | {"weights": None}}},
            "weights is None",
        ),
        (COMPRESSED | {"config_groups": {}}, "config_groups is {}"),
        (HF_BLOCK | {"fmt": "e5m2"}, "fmt is 'e5m2'; supported: 'e4m3'"),
        (HF_BLOCK | {"scale_fmt": "ue8m0"}, "scale_fmt is 'ue8m0'"),
        (HF_BLOCK | {"expert_dtype": "fp4"}, "expert_dtype is 'fp4'"),
        (HF_BLOCK | {"rotation": "hadamard"}, "rotation is 'hadamard', which is not understood"),
        (HF_BLOCK | {"weight_block_size": [128]}, r"weight_block_size is \[128\]"),
        (NATIVE | {"qformat_weight": "int4"}, "qformat_weight is 'int4'; supported: 'fp8_e4m3'"),
        (NATIVE | {"qscheme_act": "TOKEN"}, "qscheme_act is 'TOKEN'"),
        ("fp8", "quantization_config is 'fp8'; it has to be an object"),
    ],
)
def test_other_quantizations_are_refused_in_one_line(section: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"quantization_config": section}))
    with pytest.raises(ValueError, match=message) as refused:
        sections.section_of_folder(file)
    assert str(refused.value).startswith(f"{file}: ") and "\n" not in str(refused.value)


def test_two_sections_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="state different quantizations"):
        sections.find_section({"quantization_config": HF_BLOCK, "quantization": NATIVE})
