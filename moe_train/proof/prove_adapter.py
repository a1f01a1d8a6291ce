"""Prove files that hold adapters alone, as `prove` does those of whole models."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from moe_train import config
from moe_train.data.records.conversation import Conversation
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import read_object
from moe_train.proof import base_modules, compare, expected, reread, texts
from moe_train.proof.checks import Fault, Finding, NotChecked, ProofRecord, run
from moe_train.proof.compare_adapter import AdapterFiles, DeltaResult, ScaleInFile, examine_adapter, summarize_deltas
from moe_train.proof.prove import describe_tensors, finish_record
from moe_train.weights.arrays import LazyParameters


class AdapterExport(NamedTuple):
    """A directory of files of adapters, and the weights that it was written from."""

    directory: Path
    layout: expected.AdapterLayout
    parameters: LazyParameters
    model: config.Model
    """The architecture of the base."""
    lora: config.Lora
    tokenizer: Tokenizer | None
    """The tokenizer whose files are in the directory; None without one."""
    chat_template: str | None
    """Jinja; None for the tokenizer's own."""
    conversations: Sequence[Conversation] = ()
    """Conversations of the training data, rendered to the tokens of training."""
    about: Mapping[str, Any] = {}
    """What else the record states."""
    base: Path | None = None
    """The base in Hugging Face's layout; None if it has to be exported to that before transformers can load it."""
    on_wrapper: bool = False
    """Whether that export is a multimodal model; with `base`, its files decide."""
    encoder: config.Encoder | None = None
    """Sizes of the tower that has adapters or trained weights; None if none has."""


def prove_adapter(export: AdapterExport) -> ProofRecord:
    """Compare files that hold adapters alone with the adapters in memory, delta by delta.

    Returns:
        The record, as of `prove`.

    Raises:
        RuntimeError: a check fails.
    """
    start = time.perf_counter()
    record: ProofRecord = {
        "format": export.layout,
        "proof": "tensors",
        "model": export.model.model_dump(mode="json"),
        **export.about,
    }
    tensors: list[compare.TensorResults] = []
    deltas: list[DeltaResult] = []
    if export.base is None:
        base = base_modules.exported_modules(export.model, export.on_wrapper, export.encoder)
    else:
        base = base_modules.read_base_modules(export.base)
    in_wrapper = export.layout == "peft" and base.is_wrapper
    record["in_wrapper"] = in_wrapper
    if export.encoder is not None:
        record["tower"] = {"encoder": export.encoder.model_dump(mode="json")}

    def check_tensors() -> Finding:
        stored = reread.tensors(export.directory)
        scale = scale_in_file(export.layout, export.directory)
        files = AdapterFiles(export.layout, stored, scale, in_wrapper, _target_parameters(export.layout, export.directory))
        files = files._replace(encoder=export.encoder)
        results, delta_results = examine_adapter(files, export.model, export.parameters, export.lora)
        tensors.append(results)
        deltas.extend(delta_results)
        results.raise_faults()
        num_bytes = sum(tensor.nbytes for tensor in stored.values())
        return Finding(f"{len(stored):,} tensors, and no others", {"count": len(stored), "bytes": num_bytes})

    def check_logits() -> Finding:
        raise NotChecked("an adapter can be run only with its base; its deltas were compared")

    # It fills `tensors` and `deltas`, which the later checks and the record read.
    checks = [run("tensors", check_tensors)]
    if export.layout == "peft":
        checks.append(run("names", partial(check_names, export.directory, base)))
    checks.append(run("deltas", partial(summarize_deltas, deltas)))
    checks.append(run("answers", check_logits))
    checks += texts.check_texts(
        export.directory, export.layout, export.tokenizer, export.chat_template, export.conversations, record
    )
    record |= {"tensors": describe_tensors(tensors), **finish_record(export.directory, checks, start)}
    return record


def check_names(directory: Path, base: base_modules.BaseModules) -> Finding:
    """Check the names of a PEFT adapter against its base."""
    return base_modules.check_adapter_names(reread.tensors(directory), read_object(directory / "adapter_config.json"), base)


def _target_parameters(layout: expected.AdapterLayout, directory: Path) -> tuple[str, ...]:
    """Return the parameters that PEFT adapts itself, rather than a linear map that has them."""
    if layout != "peft":
        return ()
    return tuple(read_object(directory / "adapter_config.json").get("target_parameters") or ())


def scale_in_file(layout: expected.AdapterLayout, directory: Path) -> ScaleInFile:
    """Return a function (name of a weight, rank) -> the factor of B·A, as the layout's own tools compute it."""
    match layout:
        case "peft":
            return partial(_peft_scale, read_object(directory / "adapter_config.json"))
        case "mistral-lora":
            scaling = float(read_object(directory / "params.json")["lora"]["scaling"])
            return lambda weight, rank: scaling
        case "gguf-lora":
            (file,) = directory.glob("*.gguf")
            alpha = float(reread.gguf_settings(file)["adapter.lora.alpha"])
            return lambda weight, rank: alpha / rank


def _peft_scale(settings: Mapping[str, Any], weight: str, rank: int) -> float:
    """Return the scale of a weight's adapter as PEFT computes it. Raises Fault if the settings state another rank."""
    # PEFT looks up the name of what it adapts: a module, or a parameter.
    parameters = settings.get("target_parameters") or ()
    module = weight if any(weight.endswith(f".{name}") for name in parameters) else weight.removesuffix(".weight")
    alpha = _value_for(module, settings["alpha_pattern"], settings["lora_alpha"])
    stated_rank = _value_for(module, settings["rank_pattern"], settings["r"])
    if stated_rank != rank:
        raise Fault(f"adapter_config.json states rank {stated_rank} for {module}, whose lora_A has {rank} rows")
    # Rank-stabilized LoRA divides alpha by the square root of the rank.
    return alpha / (math.sqrt(rank) if settings["use_rslora"] else rank)


def _value_for(module: str, patterns: Mapping[str, float], default: float) -> float:
    """Return the value of the first pattern that matches the module's name, as PEFT does; the default if none matches."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
