"""What Hugging Face's files of latent attention must hold, independent of the table of names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.proof import expected
from moe_train.weights import external, names
from tests.random_parameters import abstract, assert_equal, random_parameters
from tests.tiny import DEEPSEEK_V3, EIGHT, LORA, MISTRAL4, ONE

FAMILIES = pytest.mark.parametrize("model", [MISTRAL4, DEEPSEEK_V3], ids=["mistral4", "deepseek_v3"])


def export(model: config.Model, out: Path, **options: Any) -> dict[str, Any]:
    weights = random_parameters(model, options.get("dtype", "float32"))
    options = {"dtype": "float32", "depth": "tensors", **options}
    return write_and_prove.export_model(weights, model, out, write_and_prove.WriteOptions(**options))


@FAMILIES
def test_every_matrix_of_a_model_is_expected_once(model: config.Model) -> None:
    tensors = expected.model_tensors("hf", model)
    assert {tensor.name: tensor.shape for tensor in tensors} == {piece.name: piece.shape for piece in names.weight_pieces(model)}
    parts = [(part.path, part.lead) for tensor in tensors for part in tensor.parts]
    assert len(set(parts)) == len(parts) == len(names.weight_pieces(model))


@FAMILIES
def test_an_export_is_proved_and_read_back_bit_for_bit_on_any_mesh(model: config.Model, tmp_path: Path) -> None:
    """In bfloat16, where the routers' biases stay float32; experts are streamed into their common tensor."""
    with jax.set_mesh(EIGHT):
        record = export(model, tmp_path / "out", dtype="bfloat16", max_shard_bytes=20_000)
        weights = random_parameters(model, "bfloat16")
        assert_equal(external.load_external_parameters(tmp_path / "out", abstract(model, "bfloat16")), weights)
    assert external.read_external_model(tmp_path / "out") == model
    checks = {check["name"]: check for check in record["checks"]}
    assert checks["tensors"]["figures"]["count"] == len({piece.name for piece in names.weight_pieces(model)})
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2


@pytest.mark.slow
@FAMILIES
def test_logits_of_a_merged_export(model: config.Model, tmp_path: Path) -> None:
    lora = LORA.model_copy(update={"targets": (config.LoraTarget(modules=("attention.*", "ffn.*"), rank=2, alpha=3.0),)})
    with jax.set_mesh(ONE):
        weights = random_parameters(model, "float32", lora)
        options = write_and_prove.WriteOptions(dtype="float32", lora=lora, merge=True)
        record = write_and_prove.export_model(weights, model, tmp_path / "out", options)
    assert all(check["passed"] is not False for check in record["checks"])
    assert {"model.layers.0.self_attn.q_a_proj.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"} <= set(
        record["adapted"]
    )


def test_gate_and_up_that_change_places_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip in the table of names that the writer uses."""
    layout = names.hugging_face_of(MISTRAL4)
    gate, up, down = layout.experts
    swapped = dataclasses.replace(layout, experts=(gate._replace(path=up.path), up._replace(path=gate.path), down))
    monkeypatch.setattr(names, "hugging_face_of", lambda model: swapped)  # which the writer asks for
    with jax.set_mesh(ONE), pytest.raises(RuntimeError, match=r"\(tensors\): model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        export(MISTRAL4, tmp_path / "out")


def test_another_scale_in_the_files_is_found(tmp_path: Path) -> None:
    """transformers would multiply scores by mscale squared if mscale_all_dim were stated."""
    with jax.set_mesh(ONE):
        export(MISTRAL4, tmp_path / "out")
    file = tmp_path / "out/config.json"
    fields = json.loads(file.read_text())
    fields["rope_parameters"]["mscale_all_dim"] = 1.0
    file.write_text(json.dumps(fields))
    from moe_train.proof.checks import Fault
    from moe_train.proof.softmax_scale import check_softmax_scale

    with pytest.raises(Fault, match="transformers would multiply scores by"):
        check_softmax_scale(tmp_path / "out", "hf", MISTRAL4)
