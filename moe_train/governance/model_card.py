"""A model card in the form of the Hugging Face Hub: metadata as YAML, then text.

Every sentence comes from a record. What only people know, such as the licence and the intended use, stands there as TODO.
"""

from __future__ import annotations

from collections.abc import Iterable

import yaml

from moe_train import config
from moe_train.governance.compute import training_flops
from moe_train.governance.lineage import Lineage, Training
from moe_train.machine.files import JsonObject

MODEL_CARD_FILE = "README.md"
"""Name of a model card in a directory."""
_TODO = "TODO"
_LIBRARIES = {"hf": "transformers", "mistral": "mistral-common", "gguf": "gguf", "peft": "peft"}
"""`library_name` of the hub by layout."""


def model_card(lineage: Lineage) -> str:
    """Return the text of the card."""
    sections = [
        f"# {lineage.name}",
        _summary(lineage),
        "## Intended use",
        f"{_TODO}: what the model is for, for whom, and what it must not be used for.",
        "## Architecture",
        _table(_architecture(lineage)),
    ]
    if lineage.training is not None:
        sections += [
            "## Training data",
            _training_data(lineage.training),
            "## Training",
            _table(_settings(lineage.training)),
            "## Results",
            _results(lineage.training),
            "## Compute",
            _table(_compute(lineage)),
        ]
    sections += [
        "## Verification",
        "An independent reader compared these files with the weights that they were written from; `export_proof.json` states what "
        "was compared, within which tolerance, and the hash of each file. `moe-train verify DIR` repeats the comparison.",
        "## Limitations",
        f"{_TODO}: known errors and biases, and what was not evaluated.",
    ]
    return _front_matter(lineage) + "\n" + "\n\n".join(sections) + "\n"


def _front_matter(lineage: Lineage) -> str:
    """Return the metadata that the hub reads."""
    metadata: JsonObject = {"license": "other", "license_name": _TODO, "license_link": _TODO, "language": [_TODO]}
    if lineage.layout in _LIBRARIES:
        metadata["library_name"] = _LIBRARIES[lineage.layout]
    metadata["pipeline_tag"] = "text-generation"
    metadata["tags"] = ["moe_train", lineage.model.family, *(["lora"] if lineage.lora else [])]
    training = lineage.training
    if training is not None:
        if training.base is not None:
            metadata["base_model"] = training.base.source
            metadata["base_model_relation"] = "adapter" if lineage.is_adapter else "finetune"
        hub_sets = _hub_sets(training.run)
        if hub_sets:
            metadata["datasets"] = hub_sets
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n"


def _hub_sets(run: config.Run) -> list[str]:
    """Return the data sets of the hub that a run trains on."""
    if not isinstance(run.data, config.RunData):
        return []
    return sorted({source.dataset for source in run.data.train if isinstance(source, config.HubSource)})


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


def _architecture(lineage: Lineage) -> dict[str, str]:
    """Return the sizes of the model."""
    model = lineage.model
    rows = {
        "layers": f"{model.num_layers}",
        "width": f"{model.model_dim:,}",
        "vocabulary": f"{model.vocab_size:,}",
        "context": f"{model.max_seq_len:,} tokens",
        "attention": f"{model.attention.name}, {model.attention.num_heads} heads",
    }
    if isinstance(model.ffn, config.MoeFfn):
        rows["experts"] = f"{model.ffn.num_experts}, of which {model.ffn.experts_per_token} serve a token"
    return rows


def _training_data(training: Training) -> str:
    """Return a table of the sets that were trained on."""
    if not training.data:
        return f"{_TODO}: the run keeps no manifest of its data."
    rows = ["| files | records | tokens | trained on | licence | origin | hash |", "|---|---|---|---|---|---|---|"]
    for manifest in training.data:
        names = ", ".join(f"`{_cell(file.path)}`" for file in manifest.files[:3])
        more = f" and {len(manifest.files) - 3} more" if len(manifest.files) > 3 else ""
        licence = _cell(manifest.licence or _TODO)
        origin = _cell(manifest.origin or _TODO)
        rows.append(
            f"| {names}{more} | {manifest.records:,} | {manifest.tokens:,} | {manifest.loss_tokens:,} | {licence} | {origin} "
            f"| `{manifest.hash[:16]}` |"
        )
    return "\n".join(rows)


def _settings(training: Training) -> dict[str, str]:
    """Return how the weights were trained."""
    run = training.run
    rows = {
        "objective": run.objective.name,
        "optimizer": run.optimizer.name,
        "learning rate": f"{run.optimizer.learning_rate:g}, schedule {run.optimizer.schedule.name}",
        "steps": f"{training.step:,}",
        "batch": f"{run.train.batch_size} rows of {run.train.seq_len:,} tokens",
        "dtype": f"{run.compute.param_dtype} parameters",
        "seed": f"{run.seed}",
    }
    if run.lora is not None:
        rows["LoRA"] = "; ".join(f"`{', '.join(target.modules)}` rank {target.rank}" for target in run.lora.targets)
    return rows


def _results(training: Training) -> str:
    """Return what the run has measured."""
    if not training.held_out:
        return f"{_TODO}: the run measured no held-out loss."
    first, last = training.held_out[0], training.held_out[-1]
    best = min(training.held_out, key=lambda measured: measured.loss)
    rows = ["| held-out loss | step | nats a token |", "|---|---|---|"]
    rows += [f"| {name} | {at.step} | {at.loss:.4f} |" for name, at in (("first", first), ("best", best), ("last", last))]
    return "\n".join(rows) + f"\n\nResults on tasks: {_TODO} (`moe-train evaluate --suite`)."


def _compute(lineage: Lineage) -> dict[str, str]:
    """Return what the training took."""
    training = lineage.training
    assert training is not None
    rows = {"model FLOPs": f"{training_flops(training):.3g}, counted over {training.step:,} steps (recomputation excluded)"}
    machines = sorted({_machine(session) for session in training.sessions})
    if machines:
        rows["hardware"] = "; ".join(machines)
    if training.seconds is not None:
        rows["time"] = f"{training.seconds / 3600:.3g} hours"
    rows["energy"] = f"{_TODO}: not measured"
    return rows


def _machine(session: JsonObject) -> str:
    """Return the devices of a start of the run."""
    hardware = session.get("hardware", {})
    return f"{hardware.get('devices', '?')} x {hardware.get('device', 'unknown device')}"


def _table(rows: dict[str, str]) -> str:
    """Return a table with two columns."""
    return "\n".join(_table_lines(rows))


def _table_lines(rows: dict[str, str]) -> Iterable[str]:
    yield "| | |"
    yield "|---|---|"
    for name, value in rows.items():
        yield f"| {name} | {_cell(value)} |"


def _cell(text: str) -> str:
    """Return a text as one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
