"""What the files of each layout must hold, independent of the table of names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moe_train.proof import expected
from moe_train.weights import names
from moe_train.weights.texts import Texts
from tests.proof.exported import MODEL, make


def test_a_slip_in_the_table_of_names_is_found(weights: Any, texts: Texts, tmp_path: Path, monkeypatch: Any) -> None:
    """Both the writer and the loader use the table: what they agree upon may still be wrong."""
    gate, up, down = names.MISTRAL.experts
    swapped = (gate._replace(name=up.name), up._replace(name=gate.name), down)
    monkeypatch.setattr(names, "mistral_of", lambda *_, **__: dataclasses.replace(names.MISTRAL, experts=swapped))
    with pytest.raises(RuntimeError, match=r"the proof failed \(tensors\): layers\.0\.feed_forward\.experts\.0\.w1"):
        make(tmp_path / "out", weights, texts, "mistral", "float32")


MATRICES = 3 + 2 * (7 + 3 * 4)
"""Both tables and a norm; in each layer two norms, four projections, a router, and three matrices of each expert."""


@pytest.mark.parametrize(("layout", "tensors"), [("hf", MATRICES), ("mistral", MATRICES), ("gguf", 3 + 2 * (7 + 3))])
def test_every_matrix_of_a_model_is_expected_once(layout: Any, tensors: int) -> None:
    found = expected.model_tensors(layout, MODEL)
    assert len({tensor.name for tensor in found}) == len(found) == tensors
    parts = [(part.path, part.lead) for tensor in found for part in tensor.parts]
    assert len(set(parts)) == len(parts) == MATRICES


@pytest.mark.parametrize(
    ("layout", "weight", "names"),
    [
        ("peft", "model.embed_tokens.weight", "base_model.model.model.embed_tokens.lora_embedding_{A,B}"),
        ("peft", "lm_head.weight", "base_model.model.lm_head.lora_{A,B}.weight"),
        ("mistral-lora", "layers.0.attention.wq.weight", "layers.0.attention.wq.lora_{A,B}.weight"),
        ("gguf-lora", "blk.0.attn_q.weight", "blk.0.attn_q.weight.lora_{a,b}"),
    ],
)
def test_names_of_adapters(layout: Any, weight: str, names: str) -> None:
    pair = names.replace("{A,B}", "A").replace("{a,b}", "a"), names.replace("{A,B}", "B").replace("{a,b}", "b")
    assert expected.adapter_names(layout, weight) == pair


def test_names_of_weights_trained_in_full() -> None:
    router, table = "model.layers.0.block_sparse_moe.gate.weight", "model.embed_tokens.weight"
    assert expected.full_weight_names("peft", router, tied=False) == ["base_model.model.model.layers.0.mlp.gate.weight"]
    assert expected.full_weight_names("peft", table, tied=True) == [f"base_model.model.{table}", "base_model.model.lm_head.weight"]
    assert expected.full_weight_names("mistral-lora", router, tied=True) == [router]
