"""A model card in the form of the Hugging Face Hub: metadata as YAML, then text.

Every sentence comes from a record. What only people know, such as the licence and the intended use, stands there as TODO.
"""

from __future__ import annotations

import yaml

from moe_train.governance.compute import training_flops
from moe_train.governance.descriptions import architecture, held_out_table, machines, sets_table, settings
from moe_train.governance.lineage import Lineage, Training, hub_sets_of
from moe_train.governance.markdown import TODO, mapping_table
from moe_train.machine.files import JsonObject

MODEL_CARD_FILE = "README.md"
"""Name of a model card in a directory."""
_LIBRARIES = {"hf": "transformers", "mistral": "mistral-common", "gguf": "gguf", "peft": "peft"}
"""`library_name` of the hub by layout."""


def model_card(lineage: Lineage) -> str:
    """Return the text of the card."""
    sections = [
        f"# {lineage.name}",
        _summary(lineage),
        "## Intended use",
        f"{TODO}: what the model is for, for whom, and what it must not be used for.",
        "## Architecture",
        mapping_table(architecture(lineage.model)),
    ]
    if lineage.training is not None:
        sections += [
            "## Training data",
            sets_table(lineage.training),
            "## Training",
            mapping_table(settings(lineage.training)),
            "## Results",
            _results(lineage.training),
            "## Compute",
            mapping_table(_compute(lineage)),
        ]
    sections += [
        "## Verification",
        "An independent reader compared these files with the weights that they were written from; `export_proof.json` states what "
        "was compared, within which tolerance, and the hash of each file. `moe-train verify DIR` repeats the comparison.",
        "## Limitations",
        f"{TODO}: known errors and biases, and what was not evaluated.",
    ]
    return _front_matter(lineage) + "\n" + "\n\n".join(sections) + "\n"


def _front_matter(lineage: Lineage) -> str:
    """Return the metadata that the hub reads."""
    metadata: JsonObject = {"license": "other", "license_name": TODO, "license_link": TODO, "language": [TODO]}
    if lineage.layout in _LIBRARIES:
        metadata["library_name"] = _LIBRARIES[lineage.layout]
    metadata["pipeline_tag"] = lineage.task
    metadata["tags"] = ["moe_train", lineage.model.family, *(["lora"] if lineage.lora else [])]
    training = lineage.training
    if training is not None:
        if training.base is not None:
            metadata["base_model"] = training.base.source
            metadata["base_model_relation"] = "adapter" if lineage.is_adapter else "finetune"
        hub_sets = hub_sets_of(training.run)
        if hub_sets:
            metadata["datasets"] = hub_sets
        if training.held_out:
            metadata["model-index"] = [{"name": lineage.name, "results": [_held_out_result(training, lineage.task)]}]
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n"


def _held_out_result(training: Training, task: str) -> JsonObject:
    """Return the last held-out loss as the hub's metadata state a result."""
    last = training.held_out[-1]
    unit = training.run.objective.loss_unit
    kind = "cross-entropy" if unit.startswith("cross-entropy") else "loss"
    metric = {"type": kind, "name": f"held-out loss at step {last.step}: {unit}", "value": last.loss}
    return {
        "task": {"type": task},
        "dataset": {"type": "held-out", "name": f"held-out data of the run {training.run.name}"},
        "metrics": [metric],
    }


def _summary(lineage: Lineage) -> str:
    """Return what the files are, in a paragraph."""
    kind = "A LoRA adapter" if lineage.is_adapter else "A model"
    text = f"{kind} of the family {lineage.model.family}, {lineage.num_parameters:,} parameters, exported by moe_train"
    training = lineage.training
    if training is None:
        return f"{text} from {lineage.source}; its weights were not trained here."
    base = "random weights" if training.base is None else training.base.source
    how = "LoRA" if lineage.lora is not None else "full training"
    merged = ", merged into the base" if lineage.lora is not None and not lineage.is_adapter else ""
    return f"{text}. It is step {training.step} of the run {training.run.name}: {how} from {base}{merged}."


def _results(training: Training) -> str:
    """Return what the run has measured."""
    if not training.held_out:
        return f"{TODO}: the run measured no held-out loss."
    return f"{held_out_table(training)}\n\nResults on tasks: {TODO} (`moe-train evaluate --suite`)."


def _compute(lineage: Lineage) -> dict[str, str]:
    """Return what the training took."""
    training = lineage.training
    assert training is not None
    rows = {"model FLOPs": f"{training_flops(training):.3g}, counted over {training.step:,} steps (recomputation excluded)"}
    devices = machines(training)
    if devices:
        rows["hardware"] = "; ".join(devices)
    if training.seconds is not None:
        rows["time"] = f"{training.seconds / 3600:.3g} hours"
    rows["energy"] = f"{TODO}: not measured"
    return rows
