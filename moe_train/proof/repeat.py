"""Repeat a proof, later and elsewhere: everything that can be checked with what is available."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np

from moe_train import config
from moe_train.machine.files import read_object
from moe_train.proof import (
    against_base,
    base_fp8,
    base_modules,
    compare,
    expected,
    fp8,
    logits,
    probe_media,
    prove,
    reread,
    surroundings,
    texts,
)
from moe_train.proof.carried import CarriedFrom, check_carried, is_audio, text_tensors
from moe_train.proof.checks import Check, Fault, Finding, NotChecked, ProofRecord, first_and_count, run
from moe_train.proof.compare_adapter import AdapterFiles, examine_adapter, summarize_deltas
from moe_train.proof.compare_logits import Reference, compare_logits
from moe_train.proof.expected_tensor import ExpectedTensor
from moe_train.proof.expected_tower import read_encoder, tower_tensors
from moe_train.proof.prove_adapter import check_names, scale_in_file
from moe_train.weights import external
from moe_train.weights.external_adapter import read_external_lora
from moe_train.weights.on_disk import WeightFiles

REPEAT_TOLERANCE = 1e-3
"""Tolerance for logits of the same files on another machine."""


def read_record(directory: Path) -> tuple[ProofRecord, config.Model]:
    """Read the record of an export.

    Returns:
        (the record, the architecture that it states).

    Raises:
        FileNotFoundError: there is no record.
        ValueError: the record cannot be read.
    """
    record = read_object(directory / surroundings.RECORD_FILE)
    try:
        if not all(isinstance(record[key], dict) for key in ("files", "tensors")):
            raise TypeError("files and tensors should be objects")
        if record["format"] not in (*get_args(expected.ModelLayout), *get_args(expected.AdapterLayout)):
            raise ValueError(f"format is {record['format']!r}")
        return record, config.Model.model_validate_json(json.dumps(record["model"]))
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{directory / surroundings.RECORD_FILE} is not a record that moe-train export wrote: {reason}; export again"
        ) from error


def repeat(
    directory: Path,
    depth: prove.Depth,
    record: ProofRecord,
    model: config.Model,
    trained: prove.Export | None = None,
    base: WeightFiles | None = None,
) -> list[Check]:
    """Run every check that can be repeated with what is available.

    Args:
        directory: the export.
        depth: `full` also runs the files, on the mesh in force.
        record: see `read_record`.
        model: see `read_record`.
        trained: the weights that the export was written from, to compare the tensors with again.
        base: the model that training started from.
    """
    layout = record["format"]
    is_model = _is_model(record)
    checks = [run("files", partial(_check_files, directory, record["files"]))]
    if is_model:
        checks.append(run("architecture", partial(_check_architecture, directory, model, layout)))
    checks.append(run("tensors", partial(_check_tensors, directory, record, model)))
    if base is not None and base_fp8.quantized_names(base):
        checks.append(run("base", partial(base_fp8.check_base, base)))
    checks.append(run("merge" if is_model else "deltas", partial(_check_weights, directory, record, model, trained, base)))
    if "carried" in record:
        checks.append(run("carried", partial(_check_carried, directory, record, model, base)))
        checks.append(run("features", partial(_check_features, directory, depth, record, model)))
    if is_model:
        checks.append(run("answers", partial(_check_logits, directory, depth, record, model)))
    checks.append(run("template", partial(_check_template, directory, record)))
    checks.append(run("generation", partial(_check_generation, directory, layout)))
    return checks


def _check_files(directory: Path, recorded: Mapping[str, str]) -> Finding:
    hashes = surroundings.file_hashes(directory)
    faults = [f"{name} is missing" for name in recorded.keys() - hashes.keys()]
    faults += [f"{name} has been added" for name in hashes.keys() - recorded.keys()]
    faults += [f"{name} has changed" for name in hashes.keys() & recorded.keys() if hashes[name] != recorded[name]]
    if faults:
        raise Fault(first_and_count(sorted(faults)))
    return Finding(f"{len(recorded):,} files have the bytes of the export", {"count": len(recorded)})


def _check_architecture(directory: Path, model: config.Model, layout: str) -> Finding:
    prove.check_architecture(external.read_external_model(directory), model, layout)
    return Finding("the files describe the architecture that was exported")


def _check_tensors(directory: Path, record: ProofRecord, model: config.Model) -> Finding:
    stored = reread.tensors(directory)
    recorded = record["tensors"]
    if _is_model(record):
        carried = _carried_names(record)
        expected_tensors = _expected_tensors(record, model)
        left_out = fp8.unquantized_modules(directory, record["format"])
        expected_kinds = {w.name: compare.stored_kind(record["format"], w, record["dtype"], left_out) for w in expected_tensors}
        of_text = {name: tensor for name, tensor in stored.items() if name not in carried}
        compare.check_names(of_text, expected_tensors, expected_kinds)
        if not any(record["tensors"][name]["dtype"].startswith("F8") for name in carried):
            fp8.check_claim(directory, record["format"], of_text)
    faults = [f"{name} is missing" for name in recorded.keys() - stored.keys()]
    faults += [f"{name} is not a tensor of the export" for name in stored.keys() - recorded.keys()]
    if faults:
        raise Fault(first_and_count(sorted(faults)))
    results = compare.examine_tensors(stored, compare.hash_only(stored), None, None).results
    changed = [f"{name} has changed" for name in recorded if results[name].sha256 != recorded[name]["sha256"]]
    if changed:
        raise Fault(first_and_count(changed))
    return Finding(f"{len(stored):,} tensors, each once, with shape, dtype and hash", {"count": len(stored)})


def _expected_tensors(record: ProofRecord, model: config.Model) -> list[ExpectedTensor]:
    """Return the tensors of the text model, and those of a tower that were trained, under their names in the export."""
    of_tower = _trained_tower(record, model)
    is_audio_tower = is_audio([*_carried_names(record), *(tensor.name for tensor in of_tower)])
    return [*text_tensors(record["format"], model, "carried" in record, is_audio_tower), *of_tower]


def _carried_names(record: ProofRecord) -> set[str]:
    """Return the names of the tensors that the export carries of a multimodal base."""
    return set(record["carried"]["tensors"]) if "carried" in record else set()


def _encoder(record: ProofRecord) -> config.Encoder | None:
    """Return the sizes of the tower of which something was trained; None if nothing was."""
    return read_encoder(record["tower"]["encoder"]) if "tower" in record else None


def _trained_tower(record: ProofRecord, model: config.Model) -> list[ExpectedTensor]:
    """Return the tensors of a tower and its projector that were trained."""
    if "tower" not in record:
        return []
    encoder = _encoder(record)
    assert encoder is not None
    return tower_tensors(record["format"], encoder, model.model_dim, record["tower"]["trained"])


def _check_carried(directory: Path, record: ProofRecord, model: config.Model, base: WeightFiles | None) -> Finding:
    """Compare the tower and projector with those of the base, if that is given and multimodal, except for what was trained."""
    if base is None or base.carried is None:
        raise NotChecked("compared by hash alone (tensors); give the multimodal base (--base) to compare with its files")
    trained = {tensor.name for tensor in _trained_tower(record, model)}
    origin = CarriedFrom(base.path, base.carried.layout)
    return check_carried(origin, record["format"], directory, dict(record, tensors={}), trained)


def _check_features(directory: Path, depth: prove.Depth, record: ProofRecord, model: config.Model) -> Finding:
    """Compare the features of the probe picture, or of the probe sound, with those of the export."""
    if depth == "tensors":
        raise NotChecked("skipped by --proof tensors: the tower was not run")
    sections: tuple[type[config.VisionEncoder | config.AudioEncoder], ...] = (config.VisionEncoder, config.AudioEncoder)
    for section in sections:
        if section.media in record:
            probed = record[section.media]
            tower = probe_media.Tower(section.model_validate_json(json.dumps(probed["encoder"])), model)
            return probe_media.check_features_again(directory, tower, probed["features"], REPEAT_TOLERANCE)
    raise NotChecked("the export was proved without a tower that can be computed, so there are no features to compare with")


def _check_weights(
    directory: Path, record: ProofRecord, model: config.Model, trained: prove.Export | None, base: WeightFiles | None
) -> Finding:
    """Compare the tensors with the trained weights if they are given, otherwise with the base if that is given."""
    if trained is not None:
        return _compare_with_trained(directory, record, trained)
    if base is None:
        raise NotChecked("neither the exported weights nor their base are given; use --run, --base, or --base with --adapter")
    prove.check_architecture(base.model, model, "mistral")  # a family with the same mathematics is accepted
    if not _is_model(record):
        read_external_lora(directory, model, _encoder(record))
        if record["format"] == "peft" and (base.path / "config.json").is_file():
            check_names(directory, base_modules.read_base_modules(base.path))
        return Finding("the adapter fits the base; its deltas are compared with --run")
    if record.get("base") and not record.get("lora"):
        raise NotChecked("the model was trained in full, so every tensor may differ from the base's; give --run")
    lora = config.Lora.model_validate_json(json.dumps(record["lora"])) if record.get("lora") else None
    untrained = 0
    for check in record["checks"]:
        # Number of deltas that were zero at the export; `figures` is the record's key of a check's metrics (`Check.to_json`).
        if check["name"] == "merge":
            untrained = check["figures"].get("untrained", 0)
    expected_tensors = _expected_tensors(record, base.model)
    return against_base.compare_with_base(expected_tensors, reread.tensors(directory), base, lora, untrained)


def _compare_with_trained(directory: Path, record: ProofRecord, trained: prove.Export) -> Finding:
    if _is_model(record):
        tensors: list[compare.TensorResults] = []
        finding = prove.check_tensors(trained, tensors, _carried_names(record))
        return finding if trained.lora is None else compare.summarize_merge(tensors[0])
    if trained.lora is None:
        raise Fault(f"{directory} contains an adapter, but the run that it is compared with trained none; give the exported run")
    layout = record["format"]
    stored = reread.tensors(directory)
    scale = scale_in_file(layout, directory)
    files = AdapterFiles(layout, stored, scale, bool(record.get("in_wrapper")), encoder=_encoder(record))
    results, deltas = examine_adapter(files, trained.model, trained.parameters, trained.lora)
    results.raise_faults()
    return summarize_deltas(deltas)


def _check_logits(directory: Path, depth: prove.Depth, record: ProofRecord, model: config.Model) -> Finding:
    if depth == "tensors":
        raise NotChecked("skipped by --proof tensors: the model was not run")
    recorded = record.get("prompts")
    if not recorded:
        raise NotChecked("the export was proved with --proof tensors, so there are no logits to compare with")
    prompts = logits.Prompts(np.array(recorded["tokens"]), np.array(recorded["positions"]))
    experts = recorded["experts_LPTA"]
    reference = Reference(
        top_ids_PTn=np.array(recorded["top_ids_PTn"]),
        top_logits_PTn=np.array(recorded["top_logits_PTn"]),
        experts_LPTA=None if experts is None else np.array(experts),
    )
    file_logits = prove.logits_of_files(directory, model, prove.numpy_dtype_name(record["dtype"]), prompts)
    difference = compare_logits(file_logits, reference, prompts, model, REPEAT_TOLERANCE)
    prove.check_difference(difference, REPEAT_TOLERANCE)
    metrics = {"tolerance": REPEAT_TOLERANCE, **difference._asdict()}
    return Finding(prove.describe_difference(difference, "the export"), metrics)


def _check_template(directory: Path, record: ProofRecord) -> Finding:
    recorded = record.get("conversations")
    if not recorded:
        raise NotChecked("the export rendered no conversations")
    tokenizer, template = texts.load_texts(directory, record["format"])
    for i, tokens in recorded.items():
        rendered = texts.rendered_examples(texts.FIXED_CONVERSATIONS[int(i)], template, tokenizer)
        texts.check_tokens(f"fixed conversation {i}", rendered, tokens)
    return Finding(f"{len(recorded)} fixed conversations are rendered to the export's tokens", {"fixed": len(recorded)})


def _check_generation(directory: Path, layout: str) -> Finding:
    tokenizer, _ = texts.load_texts(directory, layout)
    return texts.check_generation(directory, layout, tokenizer.end_ids)


def _is_model(record: ProofRecord) -> bool:
    """Return whether the export is a whole model, not an adapter alone."""
    return record["format"] in get_args(expected.ModelLayout)
