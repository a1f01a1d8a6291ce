"""FP8 models of every spelling are read as what they stand for, on any mesh; files that contradict themselves are refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train import config
from moe_train.model.parameters import Parameters
from moe_train.model.quantize import Quantized, dequantize
from moe_train.weights import external
from moe_train.weights.fp8 import pair
from moe_train.weights.fp8.sections import Fp8Section
from tests.random_parameters import abstract, assert_equal
from tests.tiny import EIGHT, LORA, MIXTRAL, ONE
from tests.weights.fp8.files import COMPRESSED, HF_BLOCK, HF_TENSOR, NATIVE, Arrays, load, quantize_folder, save

Spelling = tuple[str, dict[str, Any], Callable[[str], str], tuple[int, int] | None, str | None]


def inverse(name: str) -> str:
    return f"{name}_scale_inv"


def plain(name: str) -> str:
    return f"{name}_scale"


def native(name: str) -> str:
    return name.removesuffix("weight") + "qscale_weight"


SPELLINGS: dict[str, Spelling] = {
    "native": ("mistral", NATIVE, native, None, "qscale_act"),
    "native without activations": ("mistral", NATIVE | {"qscheme_act": "NO_SCALES"}, native, None, None),
    "native fake quantizer": ("mistral", NATIVE, native, None, "k_fake_quantizer.qscale_act"),
    "native blocks": ("mistral", COMPRESSED, plain, (4, 4), None),
    "hf tensor": ("hf", HF_TENSOR, inverse, None, "activation_scale"),
    "hf blocks": ("hf", HF_BLOCK, inverse, (4, 4), None),
    "hf ragged blocks": ("hf", HF_BLOCK | {"weight_block_size": [5, 3]}, inverse, (5, 3), None),
    "auto-fp8": ("hf", {"quant_method": "fp8", "ignored_layers": ["lm_head"]}, plain, None, "input_scale"),
    "compressed-tensors": ("hf", COMPRESSED, plain, (4, 4), None),
}


def quantized(unquantized: dict[str, Path], spelling: str, out: Path) -> tuple[Path, Arrays]:
    layout, section, scale_name, steps, activation = SPELLINGS[spelling]
    return quantize_folder(unquantized[layout], out, section, scale_name, steps, activation)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read_bit_for_bit(spelling: str, unquantized: dict[str, Path], tmp_path: Path) -> None:
    folder, meaning = quantized(unquantized, spelling, tmp_path / "q")
    weights = external.open_external_weights(folder)
    assert weights.tensors.keys() == meaning.keys() and weights.dtype == "bfloat16" and weights.model == MIXTRAL
    for name, tensor in weights.tensors.items():
        assert tensor.dtype == meaning[name].dtype and tensor.shape == meaning[name].shape
        np.testing.assert_array_equal(tensor.read().view(np.uint16), meaning[name].view(np.uint16), name)


@pytest.mark.parametrize("spelling", ["native", "hf ragged blocks"])
def test_a_mesh_reads_what_one_device_reads(spelling: str, unquantized: dict[str, Path], tmp_path: Path) -> None:
    folder, meaning = quantized(unquantized, spelling, tmp_path / "q")
    # The same values, unquantized, are read by the code that has nothing to do with FP8.
    layout = SPELLINGS[spelling][0]
    plain_folder = tmp_path / "plain"
    plain_folder.mkdir()
    for file in unquantized[layout].glob("*.json"):
        if "index" not in file.name:
            (plain_folder / file.name).write_bytes(file.read_bytes())
    save(meaning, plain_folder / ("model.safetensors" if layout == "hf" else "consolidated.safetensors"))
    for mesh in (EIGHT, ONE):
        with jax.set_mesh(mesh):
            like = abstract(MIXTRAL, "bfloat16")
            assert_equal(external.load_external_parameters(folder, like), external.load_external_parameters(plain_folder, like))
    assert external.hash_external_model(folder) == external.hash_external_model(plain_folder)


@pytest.mark.parametrize("spelling", ["native", "hf blocks", "hf ragged blocks"])
def test_a_base_in_fp8_keeps_the_values_of_its_files(spelling: str, unquantized: dict[str, Path], tmp_path: Path) -> None:
    """Blocks of 4 inputs lie within the files' blocks of 4, or within a whole matrix, but not within blocks of 3."""
    folder, _ = quantized(unquantized, spelling, tmp_path / "q")
    lora = config.Lora(targets=LORA.targets, quantize=config.Fp8(name="fp8", block_size=2))
    plain: Parameters = {}
    quantized_values: dict[str, list[np.ndarray]] = {}
    for mesh in (ONE, EIGHT):
        with jax.set_mesh(mesh):
            plain = external.load_external_parameters(folder, abstract(MIXTRAL, "bfloat16"))
            like = {path: x for path, x in abstract(MIXTRAL, "bfloat16", lora).items() if "lora" not in path}
            loaded = external.load_external_parameters(folder, like)
        for path, x in loaded.items():
            quantized_values.setdefault(path, []).append(np.asarray(x))
    for path, (one, eight) in quantized_values.items():
        np.testing.assert_array_equal(one, eight, path)
        weight, _, part = path.rpartition(".")
        if part != "codes":
            continue
        pair_of_arrays = Quantized(one, quantized_values[f"{weight}.scales"][0])
        values = np.asarray(dequantize(Quantized(*map(jnp.asarray, pair_of_arrays)), jnp.dtype(jnp.bfloat16))).astype(np.float32)
        exact = np.asarray(plain[weight]).astype(np.float32)
        if spelling == "hf ragged blocks":
            assert 0 < np.abs(values - exact).max() <= np.abs(exact).max() / 16
        else:
            np.testing.assert_array_equal(values, exact, path)


FUSED = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("name", "shape", "scales", "section", "steps"),
    [
        (FUSED, (3, 8, 6), (3, 1, 1), HF_TENSOR, (1, 8, 6)),
        (FUSED, (3, 8, 6), (3,), HF_TENSOR, (1, 8, 6)),
        (FUSED, (3, 8, 6), (3, 2, 1), HF_TENSOR, (1, 4, 6)),
        (FUSED, (3, 8, 6), (3, 2), HF_TENSOR, (1, 4, 6)),
        (FUSED, (3, 8, 6), (3, 2, 2), HF_BLOCK, (1, 4, 4)),
        (FUSED, (3, 4, 6), (3, 2, 2), HF_BLOCK, (1, 2, 4)),
        (FUSED, (3, 200, 6), (3, 2, 1), HF_TENSOR, (1, 100, 6)),
        (FUSED, (3, 8, 6), (), HF_TENSOR, (3, 8, 6)),
        ("w", (8, 6), (8, 1), {}, (1, 6)),
        ("w", (8, 6), (8,), {}, (1, 6)),
        ("w", (8, 6), (1,), {}, (8, 6)),
        ("w", (129, 300), (2, 3), {}, (128, 128)),
        ("w", (8, 6), (2, 1), HF_TENSOR, None),
        ("w", (8, 6), (3, 2), HF_BLOCK, None),
        ("w", (8, 6), (6,), {}, None),
        (FUSED.replace("gate_up", "down"), (3, 8, 6), (3, 2, 1), HF_TENSOR, None),
        (FUSED, (3, 8, 6), (2,), HF_TENSOR, None),
    ],
)
def test_scales_of_a_shape_lie_over_the_tensor(
    name: str, shape: tuple[int, ...], scales: tuple[int, ...], section: dict[str, Any], steps: tuple[int, ...] | None
) -> None:
    granularity: Any = {"static": "tensor", "dynamic": "block", None: None}[section.get("activation_scheme")]
    stated = Fp8Section("f", granularity, (4, 4) if granularity == "block" else (128, 128))
    grid = pair.scale_grid(name, shape, scales, stated)
    assert (grid and grid.steps) == steps


W = "model.layers.1.self_attn.o_proj.weight"
Change = Callable[[Arrays], Any]


def set_to(name: str, value: Any) -> Change:
    return lambda arrays: arrays.update({name: value})


@pytest.mark.parametrize(
    ("change", "section", "message"),
    [
        (lambda arrays: arrays.pop(f"{W}_scale_inv"), HF_BLOCK, f"{W} is FP8, but has no scale .looked for {W}_scale_inv"),
        (lambda arrays: arrays.pop(W), HF_BLOCK, f"{W}_scale_inv is the scale of no FP8 weight"),
        (set_to(W, np.ones((8, 24), np.float32)), HF_BLOCK, f"{W}_scale_inv is the scale of no FP8 weight"),
        (set_to(f"{W}_scale", np.ones((2, 6), np.float32)), HF_BLOCK, "has two scales"),
        (
            set_to(f"{W}_scale_inv", np.ones((2, 5), np.float32)),
            HF_BLOCK,
            r"has the shape \(2, 5\), which does not fit .*\(2, 6\) for",
        ),
        (set_to(f"{W}_scale_inv", np.ones((2, 6), np.int32)), HF_BLOCK, "has dtype I32; supported"),
        (set_to(f"{W}_scale_inv", np.ones((), np.float32)), HF_BLOCK, "states blocks of 4 x 4, but .* has the shape"),
        (lambda arrays: None, HF_TENSOR, "states one scale per tensor, but|does not fit"),
    ],
)
def test_files_that_contradict_themselves_are_refused_in_one_line(
    change: Change, section: dict[str, Any], message: str, unquantized: dict[str, Path], tmp_path: Path
) -> None:
    folder, _ = quantized(unquantized, "hf blocks", tmp_path / "q")
    file = folder / "model.safetensors"
    arrays = load(file)
    change(arrays)
    save(arrays, file)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": section}))
    with pytest.raises(ValueError, match=message) as refused:
        external.open_external_weights(folder)
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)


def test_damaged_values_are_refused_when_they_are_loaded(unquantized: dict[str, Path], tmp_path: Path) -> None:
    folder, _ = quantized(unquantized, "hf tensor", tmp_path / "q")
    arrays = load(folder / "model.safetensors")
    arrays[W].view(np.uint8)[3, 4] = 0xFF
    save(arrays, folder / "model.safetensors")
    with jax.set_mesh(EIGHT), pytest.raises(ValueError, match=rf"{W}\[3, 4\] is NaN"):
        external.load_external_parameters(folder, abstract(MIXTRAL, "bfloat16"))


def test_a_config_and_files_that_disagree_are_named(
    unquantized: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, meaning = quantized(unquantized, "hf blocks", tmp_path / "q")
    settings = json.loads((folder / "config.json").read_text())
    del settings["quantization_config"]
    (folder / "config.json").write_text(json.dumps(settings))
    blocks = {"w": np.ones((4, 4), meaning[W].dtype)}
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="does not fit"):
        external.open_external_weights(folder)
    assert "no config states a quantization" in caplog.text
    caplog.clear()
    save(blocks, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(settings | {"quantization_config": HF_BLOCK}))
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError):
        external.open_external_weights(tmp_path)
    assert "states FP8 weights, but no tensor of the files is FP8" in caplog.text
