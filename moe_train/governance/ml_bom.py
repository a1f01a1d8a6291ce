"""A machine-learning bill of materials in CycloneDX 1.6 (https://cyclonedx.org/docs/1.6/json): the model, its base and its data."""

from __future__ import annotations

import json
import uuid

import moe_train
from moe_train import config
from moe_train.governance.compute import training_flops
from moe_train.governance.lineage import Lineage, Training
from moe_train.machine.files import JsonObject

ML_BOM_FILE = "ml_bom.cdx.json"
"""Name of the bill of materials in a directory."""


def ml_bom(lineage: Lineage) -> JsonObject:
    """Return the bill of materials, without a time, so that the same export gives the same document."""
    training = lineage.training
    model = _model_component(lineage)
    components = [model]
    depends_on = []
    if training is not None and training.base is not None:
        components.append(_base_component(training))
        depends_on.append("base")
    if training is not None:
        data = _data_components(training)
        components += data
        depends_on += [component["bom-ref"] for component in data]
    document: JsonObject = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "moe_train", "version": moe_train.__version__}]},
            "component": {"type": "machine-learning-model", "name": lineage.name, "bom-ref": "export"},
        },
        "components": components,
        "dependencies": [{"ref": "export", "dependsOn": ["model"]}, {"ref": "model", "dependsOn": depends_on}],
    }
    identity = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(document, sort_keys=True))
    return {**document, "serialNumber": f"urn:uuid:{identity}"}


def _model_component(lineage: Lineage) -> JsonObject:
    """Return the entry of the model, with its model card."""
    parameters: JsonObject = {
        "task": lineage.task,
        "architectureFamily": "transformer, mixture of experts" if isinstance(lineage.model.ffn, config.MoeFfn) else "transformer",
        "modelArchitecture": lineage.model.family,
        "inputs": [{"format": kind} for kind in lineage.inputs],
        "outputs": [{"format": "text" if lineage.model.scores is None else "scores"}],
    }
    card: JsonObject = {"modelParameters": parameters}
    properties = [
        {"name": "moe_train:layout", "value": lineage.layout},
        {"name": "moe_train:parameters", "value": str(lineage.num_parameters)},
        {"name": "moe_train:proof", "value": "export_proof.json"},
    ]
    training = lineage.training
    if training is not None:
        parameters["approach"] = {"type": "self-supervised" if _is_pretraining(training) else "supervised"}
        parameters["datasets"] = [{"ref": component["bom-ref"]} for component in _data_components(training)]
        if training.held_out:
            last = training.held_out[-1]
            unit = training.run.objective.loss_unit
            metric = {"type": f"held-out {unit}", "value": f"{last.loss:.6g}", "slice": f"step {last.step}"}
            card["quantitativeAnalysis"] = {"performanceMetrics": [metric]}
        properties += [
            {"name": "moe_train:run", "value": training.run.name},
            {"name": "moe_train:step", "value": str(training.step)},
            {"name": "moe_train:model_flops", "value": f"{training_flops(training):.6g}"},
        ]
        if training.data_hash is not None:
            properties.append({"name": "moe_train:manifest_sha256", "value": training.data_hash})
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": lineage.name,
        "modelCard": card,
        "properties": properties,
    }


def _is_pretraining(training: Training) -> bool:
    """Return whether all data are plain text, of which every token is trained on."""
    data = training.run.data
    return isinstance(data, config.RunData) and all(
        isinstance(getattr(source, "record", None), config.TextRecord) for source in data.train
    )


def _base_component(training: Training) -> JsonObject:
    """Return the entry of the model that training started from."""
    base = training.base
    assert base is not None
    properties = [{"name": f"sha256:{name}", "value": digest} for name, digest in sorted(base.hashes.items())]
    if base.step is not None:
        properties.append({"name": "moe_train:step", "value": str(base.step)})
    return {"type": "machine-learning-model", "bom-ref": "base", "name": base.source, "properties": properties}


def _data_components(training: Training) -> list[JsonObject]:
    """Return an entry for each set that was trained on."""
    components = []
    for manifest in training.data:
        component: JsonObject = {
            "type": "data",
            "bom-ref": f"data:{manifest.hash}",
            "name": ", ".join(file.path for file in manifest.files[:3]) or manifest.hash,
            "hashes": [{"alg": "SHA-256", "content": manifest.hash}],
            "data": [{"type": "dataset", "name": manifest.origin or "TODO: origin"}],
            "properties": [
                {"name": "moe_train:records", "value": str(manifest.records)},
                {"name": "moe_train:tokens", "value": str(manifest.tokens)},
            ],
        }
        if manifest.licence is not None:
            component["licenses"] = [{"license": {"name": manifest.licence}}]
        components.append(component)
    # A set that is trained on as several sources stands there once.
    return list({component["bom-ref"]: component for component in components}.values())
