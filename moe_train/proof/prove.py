"""Prove an export: a second reader reads the files back and compares them with the weights that were exported.

`expected` states what the files must contain, `reread` reads them, and `compare` and `logits` compare; none of them shares code
with the writers. Every check states what it compared, how many items, and within which tolerance. The record is kept in the
directory, so that `moe-train verify` can repeat the proof.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_train import config
from moe_train.data.records.normal_form import Conversation
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.revision import code_revision
from moe_train.model.paths import ParameterPath
from moe_train.proof import base_fp8, compare, expected, fp8, logits, probe_media, reread, texts
from moe_train.proof.carried import CarriedFrom, carried_names, carries_quantized, check_carried, is_audio, text_tensors
from moe_train.proof.checks import Check, Fault, Finding, MetricValue, NotChecked, ProofRecord, require, run
from moe_train.proof.compare_logits import Difference, compare_logits, to_reference
from moe_train.proof.expected_tensor import ExpectedTensor
from moe_train.proof.expected_tower import tower_tensors
from moe_train.proof.round_weights import round_weights
from moe_train.proof.rounding import QUANTIZATION_BOUNDS
from moe_train.proof.softmax_scale import check_softmax_scale
from moe_train.proof.surroundings import RECORD_FILE, file_hashes, hardware, versions
from moe_train.weights import external, together
from moe_train.weights.arrays import LazyParameters
from moe_train.weights.on_disk import WeightFiles

Depth = Literal["full", "tensors"]
"""`full` also runs the model; `tensors` compares files and weights only."""
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-3, "float16": 2e-3, "q8_0": 0.1}
"""Tolerance of logits by dtype: largest difference over the largest logit.

The weights that they are compared with are rounded to the file's dtype, except for Q8_0. FP8 files, and those that llama.cpp has
quantized to fewer bits, are measured but not judged: no tolerance could tell a fault from the effect of the quantization.
"""
STORED_LOGITS = 8
"""Number of logits per position that the record keeps."""


class Export(NamedTuple):
    """A directory of files, and the weights that it was written from."""

    directory: Path
    layout: expected.ModelLayout
    dtype: str
    parameters: LazyParameters
    model: config.Model
    lora: config.Lora | None
    """The section of the adapters that were merged; None if nothing was."""
    tokenizer: Tokenizer | None
    chat_template: str | None
    conversations: Sequence[Conversation] = ()
    """Conversations of the training data, rendered to the tokens of training."""
    about: Mapping[str, Any] = {}
    """What else the record states: the origin, and hashes of config and data."""
    carried_from: CarriedFrom | None = None
    """The multimodal base whose tower and projector are in the directory; None for a text model alone."""
    base: WeightFiles | None = None
    """The files that training started from, if they are FP8, so that they are dequantized a second time."""
    encoder: config.Encoder | None = None
    """Sizes of the tower in the files of which `parameters` has trained weights; None if nothing of it was trained."""

    @property
    def trained_tower(self) -> list[ExpectedTensor]:
        """The tensors of the tower and its projector that were trained."""
        if self.encoder is None or self.layout == "gguf":
            return []
        return tower_tensors(self.layout, self.encoder, self.model.model_dim, self.parameters)


def prove(export: Export, depth: Depth) -> ProofRecord:
    """Compare the files of an export with the weights that it was written from.

    The mesh of the weights must be in force; several processes call this together.

    Args:
        export: the files and the weights.
        depth: `tensors` skips the checks that run the model.

    Returns:
        The record to be kept with the files.

    Raises:
        RuntimeError: a check fails.
    """
    start = time.perf_counter()
    record: ProofRecord = {
        "format": export.layout,
        "dtype": export.dtype,
        "proof": depth,
        "model": export.model.model_dump(mode="json"),
        **export.about,
    }
    checks = [run("architecture", partial(_check_architecture_of_files, export))]
    if export.base is not None:
        checks.append(run("base", partial(base_fp8.check_base, export.base)))
    # `check_tensors` fills this list, which `_check_merge` and the record read, so the order of the checks matters.
    tensors: list[compare.TensorResults] = []
    carried: list[str] = []
    of_tower: set[str] = set()
    if export.carried_from is not None:
        if export.encoder is not None:
            paths = sorted(path for path in export.parameters if ParameterPath.parse(path).is_tower)
            record["tower"] = {"encoder": export.encoder.model_dump(mode="json"), "trained": paths}
        of_tower = {tensor.name for tensor in export.trained_tower}
        carried = [name for name in carried_names(export.carried_from, export.layout) if name not in of_tower]
    checks.append(run("tensors", partial(check_tensors, export, tensors, carried)))
    checks.append(run("merge", partial(_check_merge, export, tensors)))
    if isinstance(export.model.attention, config.MultiHeadLatentAttention):
        checks.append(run("softmax scale", partial(check_softmax_scale, export.directory, export.layout, export.model)))
    checks.append(run("answers", partial(_check_logits, export, depth, record)))
    checks += texts.check_texts(
        export.directory, export.layout, export.tokenizer, export.chat_template, export.conversations, record
    )
    adapted: list[str] = []
    for results in tensors:
        adapted += [name for name, result in results.results.items() if result.merged]
    record["adapted"] = adapted
    record["lora"] = None if export.lora is None else export.lora.model_dump(mode="json")
    record["tensors"] = describe_tensors(tensors)
    if export.carried_from is not None:
        check = partial(check_carried, export.carried_from, export.layout, export.directory, record, of_tower)
        checks.append(run("carried", check))
        checks.append(run("features", partial(_check_features, export, export.carried_from, depth, record)))
    return record | finish_record(export.directory, checks, start)


def describe_tensors(tensors: Iterable[compare.TensorResults]) -> dict[str, dict[str, Any]]:
    """Return the file, dtype, shape and hash of every tensor, for the record."""
    descriptions: dict[str, dict[str, Any]] = {}
    for results in tensors:
        for name, result in results.results.items():
            stored = results.stored[name]
            descriptions[name] = {
                "file": stored.file.name,
                "dtype": stored.kind,
                "shape": stored.shape,
                "sha256": result.sha256,
            }
    return descriptions


def finish_record(directory: Path, checks: list[Check], start: float) -> ProofRecord:
    """Return the entries that end every record.

    Raises:
        RuntimeError: a check failed; raised in all processes.
    """
    _require_everywhere(checks)
    hashes = file_hashes(directory) if together.is_first() else {}
    return {
        "files": hashes,
        "checks": [check.to_json() for check in checks],
        "seconds": time.perf_counter() - start,
        "hardware": hardware(),
        "versions": versions(),
        "code": code_revision()._asdict(),
    }


def _require_everywhere(checks: list[Check]) -> None:
    """Raise RuntimeError in all processes if a check failed in one; the first process has compared the tensors."""
    if not together.all_agree(all(check.passed is not False for check in checks)):
        require(checks)
        raise RuntimeError("the proof failed in another process; see that process's output for the fault")


def write_record(directory: Path, record: ProofRecord) -> None:
    """Write the record into the directory of the export."""
    (directory / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


# --- architecture and tensors ----------------------------------------------------------------------------------------


def _check_architecture_of_files(export: Export) -> Finding:
    model = external.read_external_model(export.directory)
    check_architecture(model, export.model, export.layout)
    return Finding("the files describe the architecture of the run")


def check_architecture(described: config.Model, exported: config.Model, layout: str) -> None:
    """Raise Fault if a directory describes another model.

    If the layout expresses the architecture differently (another family of the same mathematics, the standard deviation of random
    weights), only what is computed has to agree.

    Args:
        described: the architecture that the directory describes.
        exported: the architecture that was exported.
        layout: layout of the files.
    """
    excluded = {"init_stddev"}
    if layout == "mistral":
        excluded.add("family")
    described_fields = described.model_dump(exclude=excluded)
    exported_fields = exported.model_dump(exclude=excluded)
    for key, value in exported_fields.items():
        if described_fields[key] != value:
            raise Fault(f"the files describe another model: {key} is {described_fields[key]}, not {value}")


def check_tensors(export: Export, out: list[compare.TensorResults], carried: Collection[str] = ()) -> Finding:
    """Compare every tensor of the files with the exported weights.

    Args:
        export: the files and the weights.
        out: receives the results, even if a fault is raised.
        carried: names of the tensors of a multimodal base's other parts, which `check_carried` compares.

    Raises:
        Fault: a tensor is missing, does not belong to the model, or differs.
    """
    stored = reread.tensors(export.directory)
    stored = {name: tensor for name, tensor in stored.items() if name not in carried}
    trained_tower = export.trained_tower
    of_tower = [*carried, *(tensor.name for tensor in trained_tower)]
    expected_tensors = text_tensors(export.layout, export.model, bool(of_tower), is_audio(of_tower))
    expected_tensors += trained_tower
    left_out = fp8.unquantized_modules(export.directory, export.layout)
    expected_kinds = {w.name: compare.stored_kind(export.layout, w, export.dtype, left_out) for w in expected_tensors}
    compare.check_names(stored, expected_tensors, expected_kinds)
    if not carries_quantized(export.carried_from, export.layout):
        fp8.check_claim(export.directory, export.layout, stored)
    results = compare.examine_tensors(stored, expected_tensors, export.parameters, export.lora)
    out.append(results)
    results.raise_faults()
    metrics: dict[str, MetricValue] = {
        "count": len(stored),
        "parameters": sum(int(np.prod(tensor.shape)) for tensor in stored.values()),
        "bytes": sum(tensor.nbytes + (tensor.scales.nbytes if tensor.scales else 0) for tensor in stored.values()),
        "tolerance": "bits; merged matrices, Q8_0 and FP8 as `merge` says",
    }
    quantized_kinds = sorted({tensor.kind for tensor in stored.values()} & QUANTIZATION_BOUNDS.keys())
    if quantized_kinds:
        bounds = {kind: QUANTIZATION_BOUNDS[kind] for kind in quantized_kinds}
        metrics["tolerance_of_few_bits"] = {
            kind: f"{bound.share:.3g} of the largest of {bound.block} numbers" for kind, bound in bounds.items()
        }
    return Finding(f"{len(stored):,} tensors, each once, with shape, dtype and the values that were exported", metrics)


def _check_merge(export: Export, tensors: list[compare.TensorResults]) -> Finding:
    if export.lora is None:
        raise NotChecked("there are no adapters")
    if not tensors:
        raise NotChecked("the tensors could not be read; see the check `tensors`")
    return compare.summarize_merge(tensors[0])


# --- logits ----------------------------------------------------------------------------------------------------------


def _check_logits(export: Export, depth: Depth, record: ProofRecord) -> Finding:
    """Compare the logits of the files with those of the trained weights; adds the prompts and logits to `record`."""
    if depth == "tensors":
        raise NotChecked("skipped by --proof tensors: the model was not run")
    model = export.model
    dtype = numpy_dtype_name(export.dtype)
    tolerance = TOLERANCES.get(dtype)
    prompts = logits.fixed_prompts(model, export.tokenizer)
    lora = None if export.lora is None else export.lora.of_text()
    parameters = {path: x for path, x in export.parameters.items() if not ParameterPath.parse(path).is_tower}
    trained, _ = logits.structure_and_shapes(model, lora, "float32")
    trained_logits = logits.probe_logits(trained, parameters, prompts)
    compared_logits = trained_logits
    compared_with = "the trainer's weights"
    is_rounded = dtype in ("bfloat16", "float16") and _is_rounded_by_writing(parameters)
    if is_rounded:
        plain, _ = logits.structure_and_shapes(model, None, "float32")
        as_in_file = partial(
            round_weights, lora=lora, dtype=jnp.dtype(dtype), keep_small=export.layout == "gguf" and dtype == "float16"
        )
        compared_logits = logits.probe_logits(plain, parameters, prompts, as_in_file)
        compared_with = f"the trainer's weights, merged and rounded to {dtype}"
    file_logits = logits_of_files(export.directory, model, dtype, prompts)
    # Without a tolerance every differing router choice counts as a near-tie, since nothing is judged.
    near = math.inf if tolerance is None else tolerance
    difference = compare_logits(file_logits, to_reference(compared_logits, model), prompts, model, near)
    metrics: dict[str, MetricValue] = {"compared_with": compared_with, "tolerance": tolerance, **difference._asdict()}
    if is_rounded:
        # With a near-tie of 1.0 practically any other choice is one: this is measured and not judged.
        unrounded = compare_logits(file_logits, to_reference(trained_logits, model), prompts, model, 1.0)
        metrics["logits_moved_by_rounding"] = unrounded.logits
    if tolerance is not None:
        check_difference(difference, tolerance)
    elif not math.isfinite(difference.logits):
        raise Fault("some logits are NaN or infinite")
    record["prompts"] = {"tokens": prompts.tokens_PT.tolist(), "positions": prompts.positions_PT.tolist()}
    for key, array in to_reference(file_logits, model, STORED_LOGITS)._asdict().items():
        record["prompts"][key] = None if array is None else array.tolist()
    summary = describe_difference(difference, compared_with)
    if tolerance is None:
        summary += f"; measured, not judged: no tolerance is known for {dtype}"
    return Finding(summary, metrics)


def _check_features(export: Export, origin: CarriedFrom, depth: Depth, record: ProofRecord) -> Finding:
    """Compare the features of a probe picture or of probe sound through the tower of the files; adds them to `record`."""
    if depth == "tensors":
        raise NotChecked("skipped by --proof tensors: the tower was not run")
    tower = probe_media.Tower(probe_media.encoder_in_files(export.directory), export.model, export.lora)
    trained = {path: x for path, x in export.parameters.items() if ParameterPath.parse(path).is_tower}
    finding, features = probe_media.check_features(export.directory, origin, tower, trained, export.dtype, TOLERANCES["float32"])
    record[tower.encoder.media] = {
        "encoder": tower.encoder.model_dump(mode="json"),
        "features": features[:, : probe_media.STORED_NUMBERS].tolist(),
    }
    return finding


def _is_rounded_by_writing(parameters: LazyParameters) -> bool:
    """Return whether a file of 16-bit numbers cannot have the weights exactly: some are wider, or adapters are merged."""
    return any(weight.dtype.itemsize > 2 or ParameterPath.parse(path).is_adapter for path, weight in parameters.items())


def logits_of_files(directory: Path, model: config.Model, dtype: str, prompts: logits.Prompts) -> logits.ProbeLogits:
    """Run the files on the prompts, loaded like any external model, on the mesh in force."""
    # float32 holds the numbers of float16 and Q8_0 files (a float16 scale times 8 bits) exactly.
    structure, shapes = logits.structure_and_shapes(model, None, "bfloat16" if dtype == "bfloat16" else "float32")
    return logits.probe_logits(structure, external.open_external_lazily(directory, shapes), prompts)


def numpy_dtype_name(dtype: str) -> str:
    """Translate llama.cpp's name of a dtype to numpy's; other names are returned as they are."""
    return {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}.get(dtype, dtype)


def check_difference(difference: Difference, tolerance: float) -> None:
    """Raise Fault if routers chose other experts, logits differ too much, or nothing could be compared."""
    if difference.wrong and difference.first_wrong is not None:
        layer, prompt, position = difference.first_wrong
        raise Fault(
            f"the router of layer {layer} chose other experts for token {position} of prompt {prompt}, which is not a near-tie "
            f"({difference.wrong} such choices in all)"
        )
    if not difference.positions:
        raise Fault("near-ties of routers had another outcome in every prompt, so no logit could be compared")
    if not difference.logits <= tolerance:  # not `>`, so that NaN is a fault too
        raise Fault(f"logits are off by {difference.logits:.3g} of the largest; the tolerance is {tolerance:g}")


def describe_difference(difference: Difference, compared_with: str) -> str:
    """Describe a difference in one line.

    Args:
        difference: the difference.
        compared_with: the words for what the logits were compared with.
    """
    summary = (
        f"logits at {difference.positions} positions are those of {compared_with}, off by {difference.logits:.1e} of the largest"
    )
    if difference.choices:
        summary += f"; {difference.choices:,} router choices agree, except for {difference.near_ties} near-ties"
    return summary
