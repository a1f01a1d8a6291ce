"""Latent attention in Mistral's and llama.cpp's files: proved exports, merged adapters, and slips that the proof finds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.model.parameters import Parameters
from moe_train.proof import expected
from moe_train.weights import names
from moe_train.weights.gguf import latent_tensors
from tests.random_parameters import random_parameters
from tests.tiny import ONE
from tests.weights.mistral.models import MISTRAL4

LORA = config.Lora(targets=(config.LoraTarget(modules=("attention.*", "ffn.*"), rank=2, alpha=3.0),))


@pytest.fixture(scope="module")
def weights() -> Parameters:
    with jax.set_mesh(ONE):
        return random_parameters(MISTRAL4, lora=LORA, scale=0.2)


def export(out: Path, weights: Parameters, layout: Any, depth: Any = "full", model: config.Model = MISTRAL4) -> dict[str, Any]:
    lora = LORA if any(".lora_" in path for path in weights) else None
    options = write_and_prove.WriteOptions(layout=layout, dtype="float32", lora=lora, merge=lora is not None, depth=depth)
    with jax.set_mesh(ONE):
        return write_and_prove.export_model(weights, model, out, options)


def base_of(weights: Parameters) -> Parameters:
    return {path: x for path, x in weights.items() if ".lora_" not in path}


@pytest.mark.parametrize("layout", ["mistral", "gguf"])
def test_a_merged_export_is_proved(layout: Any, weights: Parameters, tmp_path: Path) -> None:
    record = export(tmp_path / "out", weights, layout)
    checks = {check["name"]: check for check in record["checks"]}
    assert all(checks[name]["passed"] for name in ("architecture", "tensors", "merge", "softmax scale", "answers"))
    assert checks["merge"]["figures"]["delta_kept"] == pytest.approx(1, abs=1e-5)
    assert checks["softmax scale"]["figures"]["scale"] == pytest.approx(18**-0.5)


@pytest.mark.parametrize(("layout", "splits"), [("mistral", 0), ("gguf", 1)])
def test_every_matrix_is_expected_once(layout: Any, splits: int) -> None:
    tensors = expected.model_tensors(layout, MISTRAL4)
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    parts = [(part.path, part.lead) for tensor in tensors for part in tensor.parts]
    pieces = names.weight_pieces(MISTRAL4, names.GGUF if layout == "gguf" else names.mistral_of(MISTRAL4))
    assert set(parts) == {(piece.path, piece.lead) for piece in pieces}
    assert len(parts) == len(pieces) + splits * MISTRAL4.num_layers  # kv_b is in two tensors


def test_swapped_parts_of_kv_b_are_found(weights: Parameters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def untransposed(matrix: np.ndarray, attention: config.MultiHeadLatentAttention) -> tuple[np.ndarray, np.ndarray]:
        heads = matrix.reshape(attention.num_heads, -1, attention.kv_lora_rank)
        n = attention.qk_nope_head_dim
        return heads[:, :n].reshape(attention.num_heads, attention.kv_lora_rank, n), heads[:, n:]

    monkeypatch.setattr(latent_tensors, "split_latents", untransposed)
    with pytest.raises(RuntimeError, match=r"\(tensors\): blk\.0\.attn_k_b\.weight in model\.gguf is not"):
        export(tmp_path / "out", base_of(weights), "gguf", "tensors")


def test_a_slip_in_the_names_of_latents_is_found(weights: Parameters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = names.mistral_of(MISTRAL4)
    gate, up, down = table.shared
    swapped = (gate._replace(name=up.name), up._replace(name=gate.name), down)
    monkeypatch.setattr(names, "mistral_of", lambda *_, **__: dataclasses.replace(table, shared=swapped))
    with pytest.raises(RuntimeError, match=r"\(tensors\): layers\.1\.shared_experts\.w1"):
        export(tmp_path / "out", base_of(weights), "mistral", "tensors")


def test_the_names_are_those_of_vllm(weights: Parameters, tmp_path: Path) -> None:
    export(tmp_path / "out", base_of(weights), "mistral", "tensors")
    found = {tensor.name for tensor in expected.model_tensors("mistral", MISTRAL4)}
    assert {"layers.0.feed_forward.w1.weight", "layers.1.gate.weight", "layers.1.experts.3.w2.weight"} <= found
    assert {"layers.1.shared_experts.w3.weight", "layers.2.attention.wkv_a_with_mqa.weight"} <= found
    assert not any("feed_forward" in name for name in found if not name.startswith("layers.0."))
    assert json.loads((tmp_path / "out/params.json").read_text())["moe"]["first_k_dense_replace"] == 1
