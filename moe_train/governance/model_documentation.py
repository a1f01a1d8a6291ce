"""The model documentation form of Annexes XI and XII of the EU AI Act, filled from records, with TODO for what only people know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from moe_train import config
from moe_train.governance.descriptions import architecture, held_out_table, machines, modalities, sets_table, settings
from moe_train.governance.ledger import Ledger
from moe_train.governance.lineage import Training
from moe_train.governance.markdown import TODO, mapping_table, table
from moe_train.governance.training_summary import dependencies


class DocumentedModel(NamedTuple):
    """A trained model, as the form describes it."""

    name: str
    trainings: tuple[Training, ...]
    """The training, and those that made its base as far as their runs are here."""
    num_parameters: int
    """Number of parameters of the whole model, the base included."""
    exports: Mapping[str, str]
    """Directory of each export -> its format, and the hash of its record."""
    hash_of_checkpoint: str
    """One sha256 over the hashes of the files of the checkpoint."""
    ledger: Ledger


def documentation_form(model: DocumentedModel) -> str:
    """Return the form as a page."""
    training = model.trainings[0]
    sections = [
        f"# Model documentation: {model.name}",
        f"Fields of the model documentation form (Annexes XI and XII). {TODO} stands where no record has the answer.",
        "## General information",
        mapping_table(_general_rows(model)),
        "## Model properties",
        mapping_table(_property_rows(model)),
        mapping_table(architecture(training.run.model)),
        "## Methods of distribution and licence",
        mapping_table({"channels": TODO, "licence": TODO}),
        "## Use",
        mapping_table(_use_rows(model)),
        "## Training process",
        mapping_table({**settings(training), "design specifications": _method(training), "key choices, and their reasons": TODO}),
        "## Data",
        sets_table(training),
        mapping_table(_data_rows(training)),
        "## Computational resources",
        mapping_table(_compute_rows(model)),
        "## Evaluation",
        _evaluation(training),
    ]
    return "\n\n".join(sections) + "\n"


def _general_rows(model: DocumentedModel) -> dict[str, str]:
    files = "; ".join(f"{directory}: {facts}" for directory, facts in model.exports.items())
    return {
        "legal name of the provider": TODO,
        "model name": model.name,
        "authenticity: checkpoint": f"sha256 {model.hash_of_checkpoint} over its files (provenance.json has each)",
        "authenticity: exported files": files or f"{TODO}: not exported yet",
        "date of release": TODO,
        "date of release on the Union market": TODO,
        "model dependencies": "; ".join(dependencies(model.trainings)) or "none: trained from random weights",
    }


def _property_rows(model: DocumentedModel) -> dict[str, str]:
    shape = model.trainings[0].run.model
    kind = "sparse mixture of experts" if isinstance(shape.ffn, config.MoeFfn) else "dense"
    return {
        "architecture": f"Decoder-only transformer of the family {shape.family}, {kind}, which predicts the next token of a text.",
        "design": _design(shape),
        "input": f"text, at most {shape.max_seq_len:,} tokens together with the output",
        "output": f"text, at most {shape.max_seq_len:,} tokens together with the input",
        "total parameters": f"{_two_figures(model.num_parameters)} ({model.num_parameters:,})",
    }


def _design(shape: config.Model) -> str:
    """Describe the design of a model in at most 100 words."""
    text = (
        f"{shape.num_layers} layers of width {shape.model_dim:,}, each with attention ({shape.attention.name}, "
        f"{shape.attention.num_heads} heads) and a feed-forward part, over a vocabulary of {shape.vocab_size:,} tokens."
    )
    if isinstance(shape.ffn, config.MoeFfn):
        text += (
            f" The feed-forward part has {shape.ffn.num_experts} experts of width {shape.ffn.ffn_dim:,}; a router sends each token "
            f"to {shape.ffn.experts_per_token} of them."
        )
    return text


def _two_figures(count: int) -> str:
    """Return a number of parameters with two significant figures."""
    for size, unit in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if count >= size:
            return f"{float(f'{count / size:.2g}'):g} {unit}"
    return f"{count}"


def _use_rows(model: DocumentedModel) -> dict[str, str]:
    formats = sorted({facts.split(",")[0] for facts in model.exports.values()})
    return {
        "acceptable use policy": TODO,
        "intended uses": TODO,
        "type and nature of the systems it can be integrated into": TODO,
        "technical means of integration": f"files in the format {', '.join(formats)}; {TODO}" if formats else TODO,
        "required hardware": TODO,
        "required software": TODO,
    }


def _method(training: Training) -> str:
    lora = training.run.lora
    if lora is None:
        return "every weight is trained"
    return f"low-rank adapters on {sum(len(target.modules) for target in lora.targets)} patterns of modules; the base is frozen"


def _data_rows(training: Training) -> dict[str, str]:
    records = sum(manifest.records for manifest in training.data)
    tokens = sum(manifest.tokens for manifest in training.data)
    return {
        "type and modality": ", ".join(modalities(training)),
        "provenance": f"origin in the table above; {TODO}: its description",
        "how the data were obtained and selected": TODO,
        "number of data points": f"{records:,} records, {tokens:,} tokens" if training.data else TODO,
        "scope and main characteristics": TODO,
        "curation": TODO,
        "measures to detect unsuitable data": TODO,
        "measures to detect identifiable biases": TODO,
    }


def _compute_rows(model: DocumentedModel) -> dict[str, str]:
    ledger = model.ledger
    return {
        "floating-point operations": f"{ledger.flops:.2g} (compute_and_energy.md says what is counted)",
        "training time": TODO if ledger.hours is None else f"{ledger.hours:.2g} hours",
        "hardware": "; ".join(machines(model.trainings[0])) or TODO,
        "energy": TODO if ledger.energy_kwh is None else f"{ledger.energy_kwh / 1000:.2g} MWh, from a stated power",
    }


def _evaluation(training: Training) -> str:
    """Return what the run has measured."""
    parts = [held_out_table(training)] if training.held_out else [f"{TODO}: the run measured no held-out loss."]
    if training.suite_scores:
        scores = [(name, f"{score:.4f}") for name, score in sorted(training.suite_scores.items())]
        parts.append(table(("suite", "mean score at this step"), scores))
    parts.append(f"{TODO}: strategy of the evaluation, adversarial testing, limitations.")
    return "\n\n".join(parts)
