"""FP8 exports that prove themselves and are read back, shards in turn, and what is not quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.proof import prove
from moe_train.weights import external, names
from moe_train.weights.fp8 import scheme, write
from moe_train.weights.safetensors_files import TensorSpec, TensorValues
from tests.random_parameters import abstract, assert_equal, random_parameters
from tests.tiny import EIGHT, LORA, MINISTRAL, MISTRAL4, MIXTRAL, ONE
from tests.weights.fp8.files import E4M3, is_linear, load, reference
from tests.weights.fp8.models import WIDE, WIDE_FUSED, WIDE_LATENT


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ("hf", MIXTRAL),
        ("hf", WIDE),
        ("hf", WIDE_LATENT),
        ("hf", MISTRAL4),
        ("hf", WIDE_FUSED),
        ("mistral", MIXTRAL),
        ("mistral", MINISTRAL),
    ],
    ids=["tensors", "blocks", "latent", "fused", "fused blocks", "mistral", "mistral, tied"],
)
def test_an_export_is_proved_and_read_back(layout: Any, model: config.Model, tmp_path: Path) -> None:
    # The model is run for one case alone, which takes a few seconds.
    depth: Any = "full" if model is MIXTRAL and layout == "hf" else "tensors"
    options = write_and_prove.WriteOptions(layout=layout, dtype="fp8", max_shard_bytes=3000, depth=depth)
    with jax.set_mesh(EIGHT):
        weights = random_parameters(model)
        report = write_and_prove.export_model(weights, model, tmp_path / "q", options)
        loaded = external.load_external_parameters(tmp_path / "q", abstract(model, "bfloat16"))
    proved = {check["name"]: check["passed"] for check in report["checks"]}
    assert proved["architecture"] and proved["tensors"] and proved["answers"] == (True if depth == "full" else None)
    arrays = {name: array for file in (tmp_path / "q").glob("*.safetensors") for name, array in load(file).items()}
    pieces = names.weight_pieces(model, names.hugging_face_of(model) if layout == "hf" else names.MISTRAL)
    chosen = scheme.hugging_face_scheme(pieces) if layout == "hf" else scheme.MISTRAL_SCHEME
    quantized = {name for name, array in arrays.items() if array.dtype == E4M3}
    linear = {name for name in arrays if is_linear(name) and "scale" not in name and "bias" not in name}
    assert quantized == linear - chosen.unquantized
    for piece in pieces:
        w = np.asarray(weights[piece.path])[piece.lead]
        stored = arrays[piece.name]
        if piece.name in quantized:
            stored = dequantized(stored, arrays[chosen.scale_name(piece.name)], chosen.block)
        file = stored[tuple(i if isinstance(i, int) else slice(*i) for i in piece.part)]
        if piece.name in quantized:
            assert np.abs(file.astype(np.float32) - piece.to_file(w)).max() <= np.abs(w).max() / 16
        else:
            np.testing.assert_array_equal(file, piece.to_file(w).astype(file.dtype))
        np.testing.assert_array_equal(piece.to_file(np.asarray(loaded[piece.path])[piece.lead]).astype(file.dtype), file)
    section = json.loads((tmp_path / "q" / ("config.json" if layout == "hf" else "params.json")).read_text())
    if layout == "mistral":
        assert section["quantization"] == {"qformat_weight": "fp8_e4m3", "qscheme_act": "NO_SCALES"}
    else:
        assert section["quantization_config"]["weight_block_size"] == (None if chosen.block is None else [128, 128])
        assert section["dtype"] == "bfloat16" and section["quantization_config"]["activation_scheme"] == "dynamic"


def dequantized(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int] | None) -> np.ndarray:
    """What a tensor stands for: of scales without blocks, each belongs to a matrix, or to half of the outputs of an expert."""
    if block is not None:
        return reference(codes, scales, (*(1,) * (codes.ndim - 2), *block))
    grid = scales.shape or (1, 1)
    steps = tuple(size // count for size, count in zip(codes.shape, grid, strict=True))
    return reference(codes, scales.reshape(grid), steps)


def test_processes_that_write_shards_in_turn_get_every_scale() -> None:
    """A tensor and its scales may be in two shards, whose tensors are asked for alternately."""
    pieces = names.weight_pieces(MISTRAL4)
    w = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    specs, values = write.tensors_of_dtype(
        pieces,
        "fp8",
        lambda piece: np.resize(w + len(piece.path), piece.part_shape).astype(write.dtype_before_writing(piece, "fp8")),
        scheme.hugging_face_scheme(pieces),
    )
    in_order = {spec.name: whole(spec, values(spec)) for spec in specs}
    for spec in reversed(specs):
        np.testing.assert_array_equal(whole(spec, values(spec)), in_order[spec.name])


def whole(spec: TensorSpec, values: TensorValues) -> np.ndarray:
    """All values of a tensor, in its shape and dtype."""
    array = values if isinstance(values, np.ndarray) else np.concatenate([part.reshape(-1) for part in values])
    assert array.dtype == spec.dtype
    return array.reshape(spec.shape)


def test_a_merged_export_is_the_rounded_sum(tmp_path: Path) -> None:
    options = write_and_prove.WriteOptions(dtype="fp8", lora=LORA, merge=True, depth="tensors")
    with jax.set_mesh(ONE):
        report = write_and_prove.export_model(random_parameters(MIXTRAL, lora=LORA), MIXTRAL, tmp_path / "q", options)
    (merge,) = (check for check in report["checks"] if check["name"] == "merge")
    assert merge["passed"] and merge["figures"]["delta_kept"] == pytest.approx(1, abs=0.01)


def test_an_fp8_model_is_exported_without_a_claim(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        weights = random_parameters(MIXTRAL)
        for layout in ("hf", "mistral"):
            options = write_and_prove.WriteOptions(layout=layout, dtype="fp8", depth="tensors")
            write_and_prove.export_model(weights, MIXTRAL, tmp_path / f"{layout}-q", options)
            lazy = external.open_external_lazily(tmp_path / f"{layout}-q", abstract(MIXTRAL, "bfloat16"))
            options = write_and_prove.WriteOptions(layout=layout, dtype="bfloat16", depth="tensors")
            write_and_prove.export_model(lazy, MIXTRAL, tmp_path / layout, options)
            assert_equal(
                external.load_external_parameters(tmp_path / layout, abstract(MIXTRAL, "bfloat16")),
                external.load_external_parameters(tmp_path / f"{layout}-q", abstract(MIXTRAL, "bfloat16")),
            )
            settings_file = tmp_path / layout / ("config.json" if layout == "hf" else "params.json")
            assert "quantization" not in settings_file.read_text()
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"quantization": scheme.MISTRAL_SECTION}))
    export = prove.Export(tmp_path / "mistral", "mistral", "bfloat16", lazy, MIXTRAL, None, None, None)
    with pytest.raises(ValueError, match=r"params\.json claims a quantization"):
        prove.check_tensors(export, [])


def test_gguf_has_no_fp8(tmp_path: Path) -> None:
    options = write_and_prove.WriteOptions(layout="gguf", dtype="fp8")
    with jax.set_mesh(ONE), pytest.raises(ValueError, match="gguf has no FP8 numbers; use --dtype q8_0"):
        write_and_prove.export_model(random_parameters(MIXTRAL), MIXTRAL, tmp_path / "q", options)


@pytest.mark.parametrize(("layout", "depth"), [("hf", "full"), ("mistral", "tensors")])
def test_float16_files_are_written_and_refuse_what_they_cannot_express(layout: Any, depth: Any, tmp_path: Path) -> None:
    options = write_and_prove.WriteOptions(layout=layout, dtype="float16", depth=depth)
    with jax.set_mesh(ONE):
        weights = random_parameters(MIXTRAL)
        report = write_and_prove.export_model(weights, MIXTRAL, tmp_path / "half", options)
        assert {check["name"]: check["passed"] for check in report["checks"]}["answers" if depth == "full" else "tensors"]
        assert external.open_external_weights(tmp_path / "half").dtype == "float16"
        with pytest.raises(ValueError, match=r"norm\.weight has numbers beyond float16's 65504; use --dtype bfloat16"):
            big = weights | {"final_norm.scale": weights["final_norm.scale"] * 1e7}
            write_and_prove.export_model(big, MIXTRAL, tmp_path / "big", options)
