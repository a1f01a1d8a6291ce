"""Repeat a proof, later and elsewhere: everything that can be checked with what is available."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np

from moe_train import config
from moe_train.machine.files import read_object
from moe_train.proof import against_base, compare, expected, logits, prove, reread, surroundings, texts
from moe_train.proof.checks import Check, Fault, NotChecked, run
from moe_train.weights import external
from moe_train.weights.external_adapter import read_external_lora
from moe_train.weights.on_disk import WeightFiles

REPEATED = 1e-3
"""Tolerance for logits of the same files on another machine."""


def read_record(directory: Path) -> tuple[dict[str, Any], config.Model]:
    """Read the record of an export.

    Returns:
        (the record, the architecture that it states).

    Raises:
        FileNotFoundError: there is no record.
        ValueError: the record cannot be read.
    """
    record = read_object(directory / surroundings.FILE)
    try:
        if not all(isinstance(record[key], dict) for key in ("files", "tensors")):
            raise TypeError("files and tensors should be objects")
        if record["format"] not in (*get_args(expected.Model), *get_args(expected.Adapter)):
            raise ValueError(f"format is {record['format']!r}")
        return record, config.Model.model_validate_json(json.dumps(record["model"]))
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{directory / surroundings.FILE} is no record of an export: {reason}") from error


def repeat(
    directory: Path,
    depth: prove.Depth,
    record: Mapping[str, Any],
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
    is_model = layout in get_args(expected.Model)
    checks = [run("files", partial(_same_files, directory, record["files"]))]
    if is_model:
        checks.append(run("architecture", partial(_same_architecture, directory, model, layout)))
    checks.append(run("tensors", partial(_same_tensors, directory, record, model)))
    checks.append(run("merge" if is_model else "deltas", partial(_same_weights, directory, record, model, trained, base)))
    if is_model:
        checks.append(run("answers", partial(_same_answers, directory, depth, record, model)))
    checks.append(run("template", partial(_same_template, directory, record)))
    checks.append(run("generation", partial(_same_generation, directory, layout)))
    return checks


def as_stored(stored: Mapping[str, reread.Stored]) -> list[expected.Wanted]:
    """Describe every tensor of the files as one that is only hashed."""
    return [expected.Wanted(name, t.shape, (expected.Part("", (), expected.as_is),)) for name, t in stored.items()]


def _same_files(directory: Path, files: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    hashes = surroundings.file_hashes(directory)
    if changed := sorted(name for name in {*hashes, *files} if hashes.get(name) != files.get(name)):
        change = "has changed"
        if changed[0] not in hashes:
            change = "is missing"
        elif changed[0] not in files:
            change = "has been added"
        raise Fault(f"{changed[0]} {change}" + (f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""))
    return f"{len(files):,} files have the bytes of the export", {"count": len(files)}


def _same_architecture(directory: Path, model: config.Model, layout: str) -> tuple[str, dict[str, Any]]:
    prove.check_architecture(external.read_external_model(directory), model, layout)
    return "what the files say of the architecture is what they said", {}


def _same_tensors(directory: Path, record: Mapping[str, Any], model: config.Model) -> tuple[str, dict[str, Any]]:
    stored = reread.tensors(directory)
    tensors = record["tensors"]
    if record["format"] in get_args(expected.Model):
        expected_tensors = expected.model_tensors(record["format"], model)
        expected_kinds = {w.name: compare.kind_of(record["format"], w, record["dtype"]) for w in expected_tensors}
        compare.check_names(stored, expected_tensors, expected_kinds)
    if different := sorted(stored.keys() ^ tensors.keys()):
        raise Fault(f"{different[0]} is {'missing' if different[0] in tensors else 'not one of the export'}")
    examined = compare.examine(stored, as_stored(stored), None, None).examined
    if changed := [name for name in tensors if examined[name].sha256 != tensors[name]["sha256"]]:
        raise Fault(f"{changed[0]} has changed" + (f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""))
    return f"{len(stored):,} tensors, each once, with shape, dtype and hash", {"count": len(stored)}


def _same_weights(
    directory: Path, record: Mapping[str, Any], model: config.Model, trained: prove.Export | None, base: WeightFiles | None
) -> tuple[str, dict[str, Any]]:
    layout = record["format"]
    if trained is not None:
        if layout not in get_args(expected.Model):
            assert trained.lora is not None
            stored = reread.tensors(directory)
            scale = prove.scale_in_file(layout, directory)
            results, deltas = compare.examine_adapter(layout, stored, trained.model, trained.parameters, trained.lora, scale)
            results.raise_faults()
            return compare.delta_figures(deltas)
        tensors: list[compare.Tensors] = []
        summary, figures = prove.check_tensors(trained, tensors)
        if trained.lora is None:
            return summary, figures
        return compare.merge_figures(tensors[0])
    if base is None:
        raise NotChecked("the weights that were exported are not here; give --run, or --base, or --base and --adapter")
    prove.check_architecture(base.model, model, "mistral")  # a family with the same mathematics is accepted
    if layout not in get_args(expected.Model):
        read_external_lora(directory, model)
        return "the adapter fits the base; its deltas are compared with --run", {}
    if record.get("base") and not record.get("lora"):
        raise NotChecked("the model was trained in full: no tensor has to be the base's; give --run")
    lora = record.get("lora") and config.Lora.model_validate_json(json.dumps(record["lora"]))
    merged: Mapping[str, Any] = next((check["figures"] for check in record["checks"] if check["name"] == "merge"), {})
    return against_base.check(layout, reread.tensors(directory), base, lora or None, merged.get("untrained", 0))


def _same_answers(
    directory: Path, depth: prove.Depth, record: Mapping[str, Any], model: config.Model
) -> tuple[str, dict[str, Any]]:
    if depth == "tensors":
        raise NotChecked("left out by --proof tensors: the files were not run")
    recorded = record.get("prompts")
    if not recorded:
        raise NotChecked("the export was proved with --proof tensors, and has no answers to compare with")
    prompts = logits.Prompts(np.array(recorded["tokens"]), np.array(recorded["positions"]))
    arrays = {key: None if recorded[key] is None else np.array(recorded[key]) for key in logits.Reference._fields}
    reference = logits.Reference(**arrays)  # type: ignore[arg-type]  # only the experts may be None
    answers = prove.load_answers(directory, model, prove.kind_of(record["dtype"]), prompts)
    difference = logits.compare(answers, reference, prompts, model, REPEATED)
    prove.check_difference(difference, REPEATED)
    return prove.say(difference, "the export"), {"tolerance": REPEATED, **difference._asdict()}


def _same_template(directory: Path, record: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    recorded = record.get("conversations")
    if not recorded:
        raise NotChecked("the export rendered no conversations")
    tokenizer, template = texts.reopened(directory, record["format"])
    for i, tokens in recorded.items():
        texts.check_tokens(f"fixed conversation {i}", texts.rendered(texts.FIXED[int(i)], template, tokenizer), tokens)
    return f"{len(recorded)} fixed conversations give the export's tokens", {"fixed": len(recorded)}


def _same_generation(directory: Path, layout: str) -> tuple[str, dict[str, Any]]:
    return texts.check_generation(directory, layout, texts.reopened(directory, layout)[0].end_ids)
