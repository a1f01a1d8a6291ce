"""The summary of training content that Article 53(1)(d) of the EU AI Act asks for, in the fields of the Commission's template.

The template is C(2025) 8311 of 5 December 2025. A field is filled from a record or says TODO; nothing is inferred from the data.
"""

from __future__ import annotations

from moe_train.governance.descriptions import modalities, sets_table
from moe_train.governance.lineage import Training, hub_sets_of
from moe_train.governance.markdown import TODO, mapping_table

_RANGES = ((1e9, "less than 1 billion tokens"), (1e13, "1 billion to 10 trillion tokens"))
"""Upper ends of the template's size ranges for text."""
_RECORD_KINDS = {
    "text": "plain text",
    "chat": "conversations",
    "completion": "prompts with completions",
    "preference": "pairs of answers, one preferred",
    "labelled": "answers with a label",
    "transcription": "sound with its transcripts",
    "classification": "texts with labels",
}
"""Kind of record in a config -> what it holds."""


def training_summary(name: str, trainings: tuple[Training, ...], written: str) -> str:
    """Return the summary as a page.

    Args:
        name: name of the model.
        trainings: the training, and those that made its base as far as their runs are here.
        written: the date on which it is written.
    """
    training = trainings[0]
    sections = [
        f"# Summary of the content used to train {name}",
        f"Fields of the template C(2025) 8311. {TODO} stands where no record has the answer.",
        mapping_table({"version of this summary": "1", "last update": written}),
        "## 1. General information",
        "### 1.1 Provider",
        _todos("provider's name and contact", "authorised representative's name and contact"),
        "### 1.2 Model",
        mapping_table(_model_rows(name, trainings)),
        "### 1.3 Modalities, size and characteristics of the training data",
        mapping_table(_modality_rows(training)),
        mapping_table(_characteristics()),
        "## 2. Data sources",
        "Sets that were trained on, with licence and origin as the config states them:",
        sets_table(training),
        *_earlier_sets(trainings),
        *_source_sections(training),
        "## 3. Data processing",
        "### 3.1 Reservation of rights (text and data mining)",
        _todos("signatory of the Code of Practice", "measures to respect reservations of rights (opt-outs)"),
        "### 3.2 Removal of illegal content",
        _todos("measures to avoid or remove illegal content"),
        "### 3.3 Other",
        mapping_table(_processing_rows(training)),
    ]
    return "\n\n".join(sections) + "\n"


def _todos(*fields: str) -> str:
    """Return a table of fields that only people can fill."""
    return mapping_table(dict.fromkeys(fields, TODO))


def _model_rows(name: str, trainings: tuple[Training, ...]) -> dict[str, str]:
    training = trainings[0]
    return {
        "versioned name": f"{name} (run {training.run.name}, step {training.step})",
        "model dependencies": "; ".join(dependencies(trainings)) or "none: trained from random weights",
        "date of placement on the Union market": TODO,
    }


def dependencies(trainings: tuple[Training, ...]) -> list[str]:
    """Return the models that a model was made from, the nearest first."""
    names = []
    for training in trainings:
        if training.base is not None:
            step = "" if training.base.step is None else f", step {training.base.step}"
            names.append(f"{training.base.source}{step} (hashes in provenance.json)")
        for manifest in training.data:
            if manifest.teacher is not None:
                names.append(f"{manifest.teacher.model} (teacher, sha256 {manifest.teacher.sha256})")
    return names


def _modality_rows(training: Training) -> dict[str, str]:
    kinds = sorted({_kind_of_set(manifest.rules.record.get("name", "")) for manifest in training.data})
    return {
        "text": f"{size_of_text(training)}. Types of content: {', '.join(kinds) or TODO}; {TODO}: subjects",
        "image": f"pictures in records; {TODO}: number and kinds" if "image" in modalities(training) else "none is trained on",
        "audio": f"sound in records; {TODO}: length and kinds" if "audio" in modalities(training) else "none is trained on",
        "video": "none is trained on",
        "other": "none is trained on",
    }


def _kind_of_set(record: str) -> str:
    return _RECORD_KINDS.get(record, record or TODO)


def size_of_text(training: Training) -> str:
    """Return the size range of the training text, and the counts behind it."""
    if not training.data:
        return f"{TODO}: the run keeps no manifest of its data"
    tokens = sum(manifest.tokens for manifest in training.data)
    positions = training.step * training.run.train.batch_size * training.run.train.seq_len
    size = next((text for end, text in _RANGES if tokens < end), "more than 10 trillion tokens")
    return f"{size} ({tokens:,} tokens of the tokenizer in the sets; {positions:,} positions were trained on, padding included)"


def _characteristics() -> dict[str, str]:
    return {
        "latest date of data acquisition": TODO,
        "does training continue on newer data after it": TODO,
        "languages": TODO,
        "other relevant characteristics": TODO,
    }


def _earlier_sets(trainings: tuple[Training, ...]) -> list[str]:
    """Return the sets of the trainings that made the base."""
    parts = []
    for training in trainings[1:]:
        parts += [f"Sets of {training.run.name}, which made the base:", sets_table(training)]
    if trainings[-1].base is not None:
        parts.append(f"Data of {trainings[-1].base.source}, the external base: {TODO}, see its own summary.")
    return parts


def _source_sections(training: Training) -> list[str]:
    """Return the sections 2.1 to 2.6."""
    hub = hub_sets_of(training.run)
    public = {"publicly available sets were used": TODO}
    if hub:
        public = {"sets of the Hugging Face Hub": f"{', '.join(hub)}; {TODO}: whether they are public, with link and dates"}
    licences = sorted({manifest.licence for manifest in training.data if manifest.licence is not None})
    stated = f"licences that the config states: {'; '.join(licences)}; " if licences else ""
    return [
        "### 2.1 Publicly available datasets",
        mapping_table({**public, "modalities, and a description of those that are not named": TODO}),
        "### 2.2 Private datasets from third parties",
        mapping_table(
            {
                "2.2.1 commercially licensed by rightsholders (yes or no, modalities)": f"{stated}{TODO}",
                "2.2.2 obtained from other third parties": TODO,
            }
        ),
        "### 2.3 Data crawled and scraped from online sources",
        "moe_train contains no crawler: data that were crawled were crawled by other means.",
        _todos("names and purposes of crawlers", "their behaviour", "period of collection", "type of content", "top domains"),
        "### 2.4 User data",
        _todos("from interactions with the model", "from the provider's other services and products"),
        "### 2.5 Synthetic data",
        mapping_table({"generated by the provider or on its behalf, with which models": _synthetic(training)}),
        "### 2.6 Other sources",
        _todos("other sources"),
    ]


def _synthetic(training: Training) -> str:
    """Return what the records state about data that models made."""
    teachers = {manifest.teacher.model for manifest in training.data if manifest.teacher is not None}
    if not teachers:
        return TODO
    return (
        f"no texts by this training: the predictions of {', '.join(sorted(teachers))} are learnt on the texts above; {TODO}: others"
    )


def _processing_rows(training: Training) -> dict[str, str]:
    """Return what the records state about the processing of the data."""
    empty = sum(manifest.empty for manifest in training.data)
    rules = sorted({manifest.too_long for manifest in training.data})
    return {
        "records without text, left out": f"{empty:,}" if training.data else TODO,
        "records that are too long": ", ".join(rules) or TODO,
        "other processing, such as filters and deduplication before the data came here": TODO,
    }
