"""Prove an export: a second reader reads the files back and compares them with the weights that were exported.

`expected` states what the files must contain, `reread` reads them, and `compare` and `logits` compare; none of them shares code
with the writers. Every check states what it compared, how many items, and within which tolerance. The record is kept in the
directory, so that `moe-train verify` can repeat the proof.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_train import config
from moe_train.data.records.normal_form import Conversation
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import read_object
from moe_train.model.paths import ParameterPath
from moe_train.model.sharding.specs import spec_of
from moe_train.proof import compare, expected, logits, reread, texts
from moe_train.proof.checks import Check, Fault, NotChecked, require, run
from moe_train.proof.surroundings import FILE, file_hashes, hardware, versions
from moe_train.weights import external, together
from moe_train.weights.arrays import LazyParameters
from moe_train.weights.merge import scale_of

Depth = Literal["full", "tensors"]
"""`full` also runs the model; `tensors` compares files and weights only."""
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-3, "float16": 2e-3, "q8_0": 0.1}
"""Tolerance of logits by dtype: largest difference over the largest logit.

The weights that they are compared with are rounded to the file's dtype, except for Q8_0. Files that llama.cpp has quantized to
fewer bits are measured but not judged: no tolerance could tell a fault from the effect of the quantization.
"""


class Export(NamedTuple):
    """A directory of files, and the weights that it was written from."""

    directory: Path
    layout: expected.Model
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


# --- of whole models -----------------------------------------------------------------------------------------------


def prove(export: Export, depth: Depth) -> dict[str, Any]:
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
    record: dict[str, Any] = {
        **{"format": export.layout, "dtype": export.dtype, "proof": depth, "model": export.model.model_dump(mode="json")},
        **export.about,
    }
    checks = [run("architecture", partial(_architecture, export))]
    tensors: list[compare.Tensors] = []
    checks.append(run("tensors", partial(check_tensors, export, tensors)))
    checks.append(run("merge", partial(_merge, export, tensors)))
    checks.append(run("answers", partial(_answers, export, depth, record)))
    checks += texts.check_texts(
        export.directory, export.layout, export.tokenizer, export.chat_template, export.conversations, record
    )
    adapted: list[str] = []
    for t in tensors:
        adapted += [name for name, result in t.examined.items() if result.merged]
    record["adapted"] = adapted
    record["lora"] = None if export.lora is None else export.lora.model_dump(mode="json")
    record |= {"tensors": _described(tensors), **_finish(export.directory, checks, start)}
    return record


def _described(tensors: Iterable[compare.Tensors]) -> dict[str, Any]:
    """Return the file, dtype, shape and hash of every tensor, for the record."""
    described: dict[str, Any] = {}
    for t in tensors:
        for name, result in t.examined.items():
            described[name] = {
                "file": t.stored[name].file.name,
                "dtype": t.stored[name].kind,
                "shape": t.stored[name].shape,
                "sha256": result.sha256,
            }
    return described


def _finish(directory: Path, checks: list[Check], start: float) -> dict[str, Any]:
    """Return the common end of every record; raises, in all processes, if a check failed."""
    _agree(checks)
    hashes = file_hashes(directory) if together.is_first() else {}
    return {
        "files": hashes,
        "checks": [check._asdict() for check in checks],
        "seconds": time.perf_counter() - start,
        "hardware": hardware(),
        "versions": versions(),
    }


def _agree(checks: list[Check]) -> None:
    """Raise in all processes if a check failed in one; the first process has compared the tensors."""
    if not together.all_agree(all(check.passed is not False for check in checks)):
        require(checks)
        raise RuntimeError("the proof failed in another process, which says why")


def _architecture(export: Export) -> tuple[str, dict[str, Any]]:
    model = external.read_external_model(export.directory)
    check_architecture(model, export.model, export.layout)
    return "what the files say of the architecture is the run's", {}


def check_architecture(found: config.Model, wanted: config.Model, layout: str) -> None:
    """Raise Fault if a directory describes another model.

    If the layout expresses the architecture differently (another family of the same mathematics, the standard deviation of random
    weights), only what is computed has to agree.

    Args:
        found: the architecture that the directory describes.
        wanted: the architecture that was exported.
        layout: layout of the files.
    """
    excluded = {"init_stddev"}
    if layout == "mistral":
        excluded.add("family")
    wanted_fields = wanted.model_dump(exclude=excluded)
    found_fields = found.model_dump(exclude=excluded)
    if different := [key for key in wanted_fields if wanted_fields[key] != found_fields[key]]:
        key = different[0]
        raise Fault(f"the files describe another model: {key} is {found_fields[key]}, not {wanted_fields[key]}")


def check_tensors(export: Export, out: list[compare.Tensors]) -> tuple[str, dict[str, Any]]:
    """Compare every tensor of the files with the exported weights.

    Args:
        export: the files and the weights.
        out: receives the results, even if a fault is raised.

    Raises:
        Fault: a tensor is missing, does not belong there, or differs.
    """
    expected_tensors = expected.model_tensors(export.layout, export.model)
    stored = reread.tensors(export.directory)
    expected_kinds = {w.name: compare.kind_of(export.layout, w, export.dtype) for w in expected_tensors}
    compare.check_names(stored, expected_tensors, expected_kinds)
    results = compare.examine(stored, expected_tensors, export.parameters, export.lora)
    out.append(results)
    results.raise_faults()
    kinds = {tensor.kind for tensor in stored.values()}
    figures = {
        "count": len(stored),
        "parameters": sum(int(np.prod(tensor.shape)) for tensor in stored.values()),
        "bytes": sum(tensor.nbytes for tensor in stored.values()),
        "tolerance": "bits; merged matrices and Q8_0 as `merge` says",
    }
    if quantized_kinds := sorted(kinds & compare.GRIDS.keys()):
        figures["tolerance_of_few_bits"] = {
            kind: f"{compare.GRIDS[kind].share:.3g} of the largest of {compare.GRIDS[kind].block} numbers"
            for kind in quantized_kinds
        }
    return f"{len(stored):,} tensors, each once, with shape, dtype and the values that were exported", figures


def _merge(export: Export, tensors: list[compare.Tensors]) -> tuple[str, dict[str, Any]]:
    if export.lora is None:
        raise NotChecked("there are no adapters")
    if not tensors:
        raise NotChecked("the tensors are not there")
    return compare.merge_figures(tensors[0])


# --- answers -------------------------------------------------------------------------------------------------------


def _answers(export: Export, depth: Depth, record: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Compare the logits of the files with those of the trained weights; adds the prompts and logits to `record`."""
    if depth == "tensors":
        raise NotChecked("left out by --proof tensors: the files were not run")
    model = export.model
    lora = export.lora
    kind = kind_of(export.dtype)
    tolerance = TOLERANCES.get(kind)
    prompts = logits.fixed_prompts(model, export.tokenizer)
    trained, _ = logits.structure_and_shapes(model, lora, "float32")
    plain, _ = logits.structure_and_shapes(model, None, "float32")
    # If no weight is wider than the file's dtype and nothing is merged, writing rounds nothing.
    wider = [x for path, x in export.parameters.items() if x.dtype.itemsize > 2 or ParameterPath.parse(path).is_adapter]
    as_trained = logits.answers(trained, export.parameters, prompts)
    compared_with = as_trained
    rounding = kind in ("bfloat16", "float16") and bool(wider)
    if rounding:
        rounded = partial(round_weights, lora=lora, dtype=jnp.dtype(kind))
        compared_with = logits.answers(plain, export.parameters, prompts, rounded)
    file_answers = load_answers(export.directory, model, kind, prompts)
    difference = logits.compare(
        # Without a tolerance every differing router choice counts as a near-tie, since nothing is judged.
        file_answers,
        logits.reference(compared_with, model),
        prompts,
        model,
        math.inf if tolerance is None else tolerance,
    )
    figures: dict[str, Any] = {
        "compared_with": f"the trainer's weights, merged and rounded to {kind}" if rounding else "the trainer's weights",
        "tolerance": tolerance,
        **difference._asdict(),
    }
    if rounding:
        unrounded = logits.compare(file_answers, logits.reference(as_trained, model), prompts, model, 1.0)
        figures["logits_moved_by_rounding"] = unrounded.logits
    if tolerance is not None:
        check_difference(difference, tolerance)
    elif not math.isfinite(difference.logits):
        raise Fault("some logits are no numbers")
    record["prompts"] = {
        "tokens": prompts.tokens_PT.tolist(),
        "positions": prompts.positions_PT.tolist(),
        **{key: None if x is None else x.tolist() for key, x in logits.reference(file_answers, model, 8)._asdict().items()},
    }
    summary = say(difference, figures["compared_with"])
    if tolerance is None:
        summary += "; measured, not judged, in so few bits"
    return summary, figures


def load_answers(directory: Path, model: config.Model, kind: str, prompts: logits.Prompts) -> logits.Answers:
    """Run the files on the prompts, loaded like any external model, on the mesh in force."""
    structure, shapes = logits.structure_and_shapes(model, None, "bfloat16" if kind == "bfloat16" else "float32")
    return logits.answers(structure, external.open_external_lazily(directory, shapes), prompts)


def kind_of(dtype: str) -> str:
    """Translate llama.cpp's name of a dtype to numpy's; other names are returned as they are."""
    return {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}.get(dtype, dtype)


def check_difference(difference: logits.Difference, tolerance: float) -> None:
    """Raise Fault if routers chose other experts, logits differ too much, or nothing could be compared."""
    if difference.wrong and difference.first_wrong is not None:
        layer, prompt, position = difference.first_wrong
        raise Fault(
            f"the router of layer {layer} chose other experts for token {position} of prompt {prompt} "
            f"({difference.wrong} such choices), which is no near-tie"
        )
    if not difference.positions:
        raise Fault("routers fell the other way in every prompt, so that no logit could be compared")
    if not difference.logits <= tolerance:
        raise Fault(f"logits are off by {difference.logits:.3g} of the largest; the tolerance is {tolerance:g}")


def say(difference: logits.Difference, what: str) -> str:
    """Describe a difference in one line.

    Args:
        difference: the difference.
        what: the words for what the logits were compared with.
    """
    summary = f"logits at {difference.positions} positions are those of {what}, off by {difference.logits:.1e} of the largest"
    if difference.choices:
        summary += f"; {difference.choices:,} choices of routers the same, {difference.near_ties} near-ties aside"
    return summary


def round_weights(parameters: Mapping[str, jax.Array], lora: config.Lora | None, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """Merge the weights with their adapters and round them to `dtype`, as in the file, on the devices that hold them."""
    rounded = {}
    for path, weight in parameters.items():
        parsed = ParameterPath.parse(path)
        if parsed.is_adapter:
            continue
        # only GGUF files are float16, and they keep these tensors in F32
        if dtype == jnp.float16 and (parsed.is_norm or parsed.is_router):
            rounded[path] = weight
            continue
        a, b = (parameters[name] if parsed.has_adapter(parameters) else None for name in parsed.adapter)
        if a is None or b is None or lora is None:
            rounded[path] = _rounded(weight, dtype=dtype)
        else:
            lead = a.ndim + b.ndim - 2 - weight.ndim  # number of stacked dims: repeats, and experts if routed
            experts = range(weight.shape[1] if lead == 2 else 1)
            scales = np.array([scale_of(lora, parsed.module_path, (0, e)[:lead]) for e in experts], np.float32)
            rounded[path] = _merged(weight, a, b, scales, dtype=dtype, transposed=parsed.is_head)
    return rounded


@partial(jax.jit, static_argnames="dtype")
def _rounded(weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return weight.astype(dtype).astype(jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32)


@partial(jax.jit, static_argnames=("dtype", "transposed"))
def _merged(weight: jax.Array, a: jax.Array, b: jax.Array, scales: np.ndarray, dtype: jnp.dtype, transposed: bool) -> jax.Array:
    """Return round(weight + scale · a·b).

    Args:
        weight: (lead…, in…, out…).
        a: (lead…, in…, J).
        b: (lead…, J, out…).
        scales: (1,), or (E,) along the last dim of lead.
        dtype: dtype to round to.
        transposed: whether the weight is (lead…, out…, in…), as the head's.
    """
    lead = a.ndim + b.ndim - 2 - weight.ndim
    letters = "abcdefgh"
    each, into, out = letters[:lead], letters[lead : a.ndim - 1], letters[a.ndim - 1 : weight.ndim]
    b *= scales.reshape(*scales.shape, *(1,) * (b.ndim - lead))
    equation = f"{each}{into}J,{each}J{out}->{each}{out + into if transposed else into + out}"
    delta = jnp.einsum(equation, a, b, out_sharding=spec_of(weight), precision=jax.lax.Precision.HIGHEST)
    return _rounded(weight.astype(jnp.float32) + delta, dtype=dtype)


# --- of adapters ---------------------------------------------------------------------------------------------------


def prove_adapter(
    directory: Path,
    layout: expected.Adapter,
    parameters: LazyParameters,
    model: config.Model,
    lora: config.Lora,
    tokenizer: Tokenizer | None,
    chat_template: str | None,
    conversations: Sequence[Conversation],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Compare files that hold adapters alone with the adapters in memory, delta by delta.

    Args:
        directory: the files.
        layout: layout of the files.
        parameters: weights by path.
        model: the architecture of the base.
        lora: the section of the adapters.
        tokenizer: the tokenizer whose files are in the directory; None without one.
        chat_template: Jinja; None for the tokenizer's own.
        conversations: training conversations whose tokens are compared.
        about: what else the record states.

    Returns:
        The record, as of `prove`.

    Raises:
        RuntimeError: a check fails.
    """
    start = time.perf_counter()
    record: dict[str, Any] = {"format": layout, "proof": "tensors", "model": model.model_dump(mode="json"), **about}
    tensors: list[compare.Tensors] = []
    deltas: list[compare.Delta] = []

    def look() -> tuple[str, dict[str, Any]]:
        stored = reread.tensors(directory)
        results, pairs = compare.examine_adapter(layout, stored, model, parameters, lora, scale_in_file(layout, directory))
        tensors.append(results)
        deltas.extend(pairs)
        results.raise_faults()
        return f"{len(stored):,} tensors, and no others", {"count": len(stored), "bytes": sum(t.nbytes for t in stored.values())}

    checks = [run("tensors", look), run("deltas", partial(compare.delta_figures, deltas))]
    checks.append(run("answers", partial(_left_out, "an adapter answers with its base alone; its deltas were compared")))
    checks += texts.check_texts(directory, layout, tokenizer, chat_template, conversations, record)
    record |= {"tensors": _described(tensors), **_finish(directory, checks, start)}
    return record


def _left_out(reason: str) -> tuple[str, dict[str, Any]]:
    """Raise NotChecked with the reason."""
    raise NotChecked(reason)


def scale_in_file(layout: expected.Adapter, directory: Path) -> Callable[[str, int], float]:
    """Return a function (name of a weight, rank) -> the factor of B·A, as the layout's own tools compute it."""
    match layout:
        case "peft":
            settings = read_object(directory / "adapter_config.json")

            def peft(weight: str, rank: int) -> float:
                module = weight.removesuffix(".weight")
                alpha = _value_for(module, settings["alpha_pattern"], settings["lora_alpha"])
                stated = _value_for(module, settings["rank_pattern"], settings["r"])
                if stated != rank:
                    raise Fault(f"adapter_config.json states rank {stated} for {module}, whose lora_A has {rank} rows")
                return alpha / (math.sqrt(rank) if settings["use_rslora"] else rank)

            return peft
        case "mistral-lora":
            scaling = float(read_object(directory / "params.json")["lora"]["scaling"])
            return lambda weight, rank: scaling
        case "gguf-lora":
            (file,) = directory.glob("*.gguf")
            alpha = float(reread.gguf_settings(file)["adapter.lora.alpha"])
            return lambda weight, rank: alpha / rank


def _value_for(module: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """Return the value of the first pattern that matches the module's name, as PEFT does; the default if none matches."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


# --- the record ----------------------------------------------------------------------------------------------------


def write(directory: Path, record: Mapping[str, Any]) -> None:
    """Write the record into the directory of the export."""
    (directory / FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
