"""The bill of materials is valid CycloneDX, and names the base, the data and the figures."""

from __future__ import annotations

import json

import pytest

from moe_train.governance.ml_bom import ml_bom
from tests.governance.lineages import SET, lineage_of


def test_it_names_base_data_and_figures(tmp_path):
    document = ml_bom(lineage_of(tmp_path, lora=True))
    model, base, data = document["components"]
    assert base["name"] == "models/base" and base["properties"][0] == {"name": "sha256:model.safetensors", "value": "a" * 64}
    assert data["hashes"] == [{"alg": "SHA-256", "content": SET.hash}] and data["data"][0]["name"] == "TODO: origin"
    assert data["licenses"] == [{"license": {"name": "internal, contract | 17"}}]
    assert model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][0]["value"] == "3.75"
    assert model["modelCard"]["modelParameters"]["datasets"] == [{"ref": data["bom-ref"]}]
    assert document == ml_bom(lineage_of(tmp_path, lora=True))


@pytest.mark.parametrize("case", ["adapter", "full", "not trained here"])
def test_it_is_valid_by_the_schema(tmp_path, case):
    validation = pytest.importorskip("cyclonedx.validation.json", reason="cyclonedx-python-lib comes with the extra judges")
    from cyclonedx.schema import SchemaVersion

    lineage = lineage_of(tmp_path, "peft" if case == "adapter" else "hf", lora=case == "adapter")
    if case == "not trained here":
        lineage = lineage._replace(training=None)
    fault = validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(ml_bom(lineage)))
    assert fault is None, fault


def test_inputs_and_task_are_those_of_the_files(tmp_path):
    lineage = lineage_of(tmp_path)._replace(carried_input="image")
    parameters = ml_bom(lineage)["components"][0]["modelCard"]["modelParameters"]
    assert parameters["inputs"] == [{"format": "text"}, {"format": "image"}] and parameters["task"] == "image-text-to-text"
