"""GGUF files without llama.cpp: read back bit for bit, and the package `gguf` as an independent reader."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf as package
import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.weights import external, gguf, names
from moe_train.weights.arrays import fetch_entry
from moe_train.weights.gguf import container
from moe_train.weights.gguf import settings as gguf_settings
from tests.random_parameters import random_parameters
from tests.tiny import EIGHT, ONE
from tests.weights.gguf.models import DEEPSEEK_V3, MINISTRAL, MINISTRAL3, MISTRAL, MISTRAL4, MIXTRAL, MOE, rewrite, shapes, write


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [MIXTRAL, MINISTRAL3, MINISTRAL, MISTRAL4, DEEPSEEK_V3], ids=lambda model: model.family)
def test_a_file_is_read_back_bit_for_bit_on_any_mesh(model: config.Model, dtype: Any, tmp_path: Path) -> None:
    with jax.set_mesh(EIGHT):
        sharded = random_parameters(model, dtype=dtype)
        file = write(tmp_path, model, sharded, dtype)
        assert external.layout_of(file) == external.layout_of(tmp_path) == "gguf"
        assert external.read_external_model(tmp_path) == model
        found = external.load_external_parameters(file, shapes(sharded))
    for path, array in sharded.items():
        assert found[path].sharding == array.sharding
        assert np.array_equal(np.asarray(found[path]), np.asarray(array)), path


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_the_package_gguf_reads_what_is_written(dtype: str, tmp_path: Path, tokenizer: HuggingFace) -> None:
    model = MIXTRAL.model_copy(update={"ffn": MOE.model_copy(update={"ffn_dim": 80})})  # rows of 80 are no blocks of 32
    with jax.set_mesh(ONE):
        parameters = random_parameters(model)
        reader = package.GGUFReader(write(tmp_path, model, parameters, dtype, tokenizer))
    assert reader.get_field("llama.expert_count").contents() == 4
    assert reader.get_field("tokenizer.ggml.tokens").contents()[:3] == ["<pad>", "<s>", "</s>"]
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {types["blk.1.attn_norm.weight"], types["blk.0.ffn_gate_inp.weight"]} == {"F32"}
    assert types["token_embd.weight"] == dtype.upper()
    assert types["blk.0.ffn_down_exps.weight"] == {"q8_0": "F16"}.get(dtype, dtype.upper())
    found = {tensor.name: package.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    table = names.weight_pieces(model, names.GGUF)
    assert {piece.name for piece in table} == set(found)
    ours = container.open_gguf(tmp_path / gguf.MODEL_FILE).tensors
    for piece in table:
        theirs = found[piece.name].reshape(piece.shape)[piece.part]
        assert np.array_equal(theirs, ours[piece.name].read(piece.part).astype(np.float32))
        wanted = piece.to_file(fetch_entry(parameters[piece.path], piece.lead)).astype(np.float32)
        size, kind = np.abs(wanted), types[piece.name]
        unit = size * {"F32": 0, "F16": 2**-11, "BF16": 2**-8}.get(kind, 0) + (2**-25 if kind == "F16" else 0)
        if kind == "Q8_0":  # half a step of the block, and the rounding of the step itself
            unit = size.reshape(-1, 32).max(1, keepdims=True).repeat(32, 1).reshape(size.shape) * (0.5 / 127 + 2**-10)
        assert np.all(np.abs(theirs - wanted) <= unit), piece.name


def test_the_package_gguf_reads_the_two_parts_of_kv_b(tmp_path: Path, tokenizer: HuggingFace) -> None:
    with jax.set_mesh(ONE):
        parameters = random_parameters(MISTRAL4)
        reader = package.GGUFReader(write(tmp_path, MISTRAL4, parameters, "f32", tokenizer))
    assert reader.get_field("general.architecture").contents() == "mistral4"
    known = {package.TENSOR_NAMES[kind] for kind in package.MODEL_TENSORS[package.MODEL_ARCH.MISTRAL4]}
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    for name in found:
        assert name.rpartition(".")[0].replace("blk.1.", "blk.{bid}.").replace("blk.0.", "blk.{bid}.") in known, name
    a = MISTRAL4.attention
    assert isinstance(a, config.MultiHeadLatentAttention)
    kv_b = np.asarray(parameters["stacks.1.layers.0.attention.kv_b_proj.weight"])[0]  # (R, N, n + v) of layer 1
    np.testing.assert_array_equal(found["blk.1.attn_k_b.weight"], kv_b[:, :, : a.qk_nope_head_dim].transpose(1, 0, 2))
    np.testing.assert_array_equal(found["blk.1.attn_v_b.weight"], kv_b[:, :, a.qk_nope_head_dim :].transpose(1, 2, 0))
    keys = ("head_count_kv", "key_length", "value_length", "key_length_mla", "value_length_mla", "temperature_length")
    stated = [reader.get_field(f"mistral4.attention.{key}").contents() for key in keys]
    assert stated == [1, a.kv_lora_rank + a.qk_rope_head_dim, a.kv_lora_rank, a.qk_head_dim, a.v_head_dim, 8]


@pytest.mark.parametrize("fused", [False, True])
def test_other_tools_files_of_latent_attention_are_read(fused: bool, tmp_path: Path) -> None:
    """Without our key; and with gate and up stacked in one tensor."""
    with jax.set_mesh(ONE):
        parameters = random_parameters(MISTRAL4)
        opened = container.open_gguf(write(tmp_path, MISTRAL4, parameters))
        arrays = {name: tensor.read() for name, tensor in opened.tensors.items()}
        if fused:
            pair = (arrays.pop("blk.1.ffn_gate_exps.weight"), arrays.pop("blk.1.ffn_up_exps.weight"))
            arrays["blk.1.ffn_gate_up_exps.weight"] = np.concatenate(pair, axis=1)
        file = tmp_path / "theirs.gguf"
        rewrite(file, {k: v for k, v in opened.settings.items() if k != gguf_settings.MODEL_KEY}, arrays)
        found = external.load_external_parameters(file, shapes(parameters))
    assert gguf.read_model_config(file) == MISTRAL4
    for path, array in parameters.items():
        assert np.array_equal(np.asarray(found[path]), np.asarray(array)), path


@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize("model", [MIXTRAL, MINISTRAL3, MISTRAL], ids=lambda model: model.family)
def test_other_tools_files_are_read(model: config.Model, per_expert: bool, tmp_path: Path) -> None:
    """Without our key; and with a tensor an expert, as files of Mixtral were at first."""
    if per_expert and model is not MIXTRAL:
        return
    with jax.set_mesh(ONE):
        parameters = random_parameters(model)
        opened = container.open_gguf(write(tmp_path, model, parameters))
        arrays = {name: tensor.read() for name, tensor in opened.tensors.items()}
        if per_expert:
            for name in [name for name in arrays if "_exps" in name]:
                arrays |= {name.replace("_exps", f".{e}"): expert for e, expert in enumerate(arrays.pop(name))}
        file = tmp_path / "theirs.gguf"
        rewrite(file, {k: v for k, v in opened.settings.items() if k != gguf_settings.MODEL_KEY}, arrays)
        found = external.load_external_parameters(file, shapes(parameters))
    assert external.read_external_model(file) == model
    assert all(np.array_equal(np.asarray(found[path]), np.asarray(array)) for path, array in parameters.items())


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        parameters = random_parameters(MISTRAL)
        parameters["embed.weight"] = jax.device_put(np.full((352, 64), 1e5, np.float32), parameters["embed.weight"].sharding)
        with np.errstate(over="ignore"), pytest.raises(ValueError, match=r"token_embd.weight has numbers beyond float16"):
            write(tmp_path, MISTRAL, parameters, "f16")


def test_k_quants_are_llama_cpps_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / gguf.QUANTIZE_TOOL
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    with jax.set_mesh(ONE):
        parameters = random_parameters(MISTRAL)
        with pytest.raises(ValueError, match=r"dtype q4_k_m .* llama-quantize, .* is not on PATH; install llama.cpp"):
            write(tmp_path / "a", MISTRAL, parameters, "q4_k_m")
        tool.parent.mkdir()
        tool.write_text('#!/bin/sh\ncp "$1" "$2"\necho "$3" > "$2.kind"\n')
        tool.chmod(0o755)
        file = write(tmp_path / "b", MISTRAL, parameters, "q4_k_m")
        assert (tmp_path / "b" / "model.gguf.kind").read_text() == "Q4_K_M\n"
        assert sorted(path.name for path in file.parent.iterdir()) == ["Modelfile", "model.gguf", "model.gguf.kind"]
        assert container.open_gguf(file).tensors["token_embd.weight"].encoding.name == "BF16"
        tool.write_text('#!/bin/sh\necho "no such type $3" >&2\nexit 1\n')
        with pytest.raises(ValueError, match=r"could not make q9_x \(exit code 1\): no such type Q9_X"):
            write(tmp_path / "c", MISTRAL, parameters, "q9_x")
