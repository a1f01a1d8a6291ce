"""Quantizing for files: scales and rounding by a plain reference, exports that prove themselves, and what is not quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.proof import prove
from moe_train.weights import external, names
from moe_train.weights.fp8 import write
from tests.random_parameters import abstract, assert_equal, random_parameters
from tests.tiny import EIGHT, LORA, MINISTRAL, MISTRAL4, MIXTRAL, ONE
from tests.weights.fp8.files import E4M3, is_linear, load, reference

WIDE = config.Model(
    family="mixtral",
    vocab_size=24,
    model_dim=128,
    num_layers=1,
    attention=config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=64),
    ffn=config.MoeFfn(name="moe", ffn_dim=256, num_experts=2, experts_per_token=1),
)
"""Every matrix is a multiple of 128 x 128."""


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_codes_and_scales_are_those_of_a_plain_reference(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    block = data.draw(st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4)))
    w = np.random.default_rng(data.draw(st.integers(0, 9))).normal(0, 10.0 ** data.draw(st.integers(-9, 3)), shape)
    w_OI = w.astype(np.float32) * np.float32(data.draw(st.sampled_from([0, 1])))
    codes, scales = write.quantize_matrix("w", w_OI.T.copy().T if data.draw(st.booleans()) else w_OI, block)
    rows, columns = block or shape
    for i, j in np.ndindex(*scales.shape or (1, 1)):
        part = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        scale = scales[i, j] if block else scales[()]
        assert scale == (np.abs(w_OI[part]).max() / np.float32(448) or 1)
        np.testing.assert_array_equal(codes[part], np.clip(w_OI[part] / scale, -448, 448).astype(E4M3))


def test_long_matrices_are_quantized_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(0).normal(size=(21, 10)).astype(np.float32)
    for block in (None, (4, 3)):
        monkeypatch.undo()
        whole = write.quantize_matrix("w", w, block)
        monkeypatch.setattr(write, "CHUNK_NUMBERS", 50)
        for once, chunked in zip(whole, write.quantize_matrix("w", w, block), strict=True):
            np.testing.assert_array_equal(once, chunked)


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("block", [None, (2, 2)])
def test_numbers_that_fp8_cannot_express_are_refused(value: float, block: tuple[int, int] | None) -> None:
    w = np.ones((4, 4), np.float32)
    w[1, 2] = value
    with pytest.raises(ValueError, match="w has infinite or NaN numbers"):
        write.quantize_matrix("w", w, block)


@pytest.mark.parametrize(
    ("layout", "model"),
    [("hf", MIXTRAL), ("hf", WIDE), ("mistral", MIXTRAL), ("mistral", MINISTRAL)],
    ids=["tensors", "blocks", "mistral", "mistral, tied"],
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
    scale = "weight_scale_inv" if layout == "hf" else "qscale_weight"
    quantized = [name for name, array in arrays.items() if array.dtype == E4M3]
    assert quantized == [name for name in arrays if is_linear(name) and not name.endswith(scale)]
    steps = (128, 128) if model is WIDE and layout == "hf" else None
    pieces = names.weight_pieces(model, names.HUGGING_FACE if layout == "hf" else names.MISTRAL)
    for piece in pieces:
        w = np.asarray(weights[piece.path])[piece.lead]
        file = arrays[piece.name]
        if piece.name in quantized:
            scales = arrays[piece.name.removesuffix("weight") + scale]
            file = reference(file, scales.reshape((1, 1)) if steps is None else scales, steps or file.shape)
            assert np.abs(file.astype(np.float32) - piece.to_file(w)).max() <= np.abs(w).max() / 16
        else:
            np.testing.assert_array_equal(file, piece.to_file(w).astype(ml_dtypes.bfloat16))
        np.testing.assert_array_equal(piece.to_file(np.asarray(loaded[piece.path])[piece.lead]), file)
    section = json.loads((tmp_path / "q" / ("config.json" if layout == "hf" else "params.json")).read_text())
    if layout == "mistral":
        assert section["quantization"] == {"qformat_weight": "fp8_e4m3", "qscheme_act": "NO_SCALES"}
    else:
        assert section["quantization_config"]["weight_block_size"] == (None if steps is None else [128, 128])
        assert section["dtype"] == "bfloat16" and section["quantization_config"]["activation_scheme"] == "dynamic"


def test_a_text_model_in_a_wrapper_is_quantized_as_released() -> None:
    alone = names.weight_pieces(WIDE)
    wrapped = names.weight_pieces(WIDE, names.WRAPPED)
    assert write.hugging_face_scheme(alone).block == (128, 128) and write.hugging_face_scheme(wrapped).block is None
    section = write.hugging_face_section(wrapped)
    assert section["weight_block_size"] is None
    assert {"model.vision_tower", "model.multi_modal_projector", "lm_head"} <= set(section["modules_to_not_convert"])
    assert not any("vision" in name for name in write.hugging_face_section(alone)["modules_to_not_convert"])


def test_processes_that_write_shards_in_turn_get_every_scale() -> None:
    """A tensor and its scales may be in two shards, whose tensors are asked for alternately."""
    w = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    pieces = names.weight_pieces(MINISTRAL)
    specs, values = write.tensors_of_dtype(
        pieces,
        "fp8",
        lambda piece: np.resize(w, piece.shape).astype(write.dtype_before_writing(piece, "fp8")),
        write.hugging_face_scheme(pieces),
    )
    in_order = {spec.name: values(spec) for spec in specs}
    for spec in reversed(specs):
        array = values(spec)
        assert isinstance(array, np.ndarray) and array.shape == spec.shape and array.dtype == spec.dtype
        np.testing.assert_array_equal(array, in_order[spec.name])


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
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"quantization": write.MISTRAL_SECTION}))
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


def test_experts_that_share_a_tensor_are_refused() -> None:
    pieces = names.weight_pieces(MISTRAL4)
    with pytest.raises(ValueError, match=r"--dtype fp8 is not supported for model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        write.tensors_of_dtype(pieces, "fp8", lambda piece: np.zeros(piece.part_shape), write.hugging_face_scheme(pieces))
