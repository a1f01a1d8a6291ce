"""Export a run's checkpoint or an external model, or only an adapter, as files that other tools load, and verify them."""

from __future__ import annotations

import datetime
import logging
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import jax

from moe_train import config
from moe_train.checkpoint.initial_files import carried_of, first_files
from moe_train.checkpoint.model_dir import LoadedWeights, OpenedModel, dtype_of_files, open_model
from moe_train.checkpoint.runs import run_folder
from moe_train.checkpoint.trained_tower import trained_tower_paths
from moe_train.commands import left_out, multimodal_base, write_and_prove
from moe_train.commands.documents import documents_of_export
from moe_train.commands.export_adapter import AdapterFiles, export_adapter
from moe_train.commands.origin_of_export import Origin, origin_of
from moe_train.commands.serve_export import serve_command
from moe_train.governance.exports_of_run import ExportEntry, hash_of_record, note_export
from moe_train.machine.files import JsonObject, refuse_existing
from moe_train.machine.mesh import join_processes
from moe_train.proof import expected, prove
from moe_train.weights import external, serve, together
from moe_train.weights.on_disk import FloatDtype
from moe_train.weights.safetensors_files import MAX_SHARD_BYTES

log = logging.getLogger(__name__)

SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
"""Bytes of the units of `--max-shard-size`."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a run or a model is exported."""

    dtype: str | None = None
    """Dtype of the files; None for that of the files that training started from, or else that of training."""
    depth: prove.Depth = "full"
    """`tensors` skips the checks that run the model."""
    server: serve.Server | None = None
    """The server that will read the files; the record then has `serve`, the command that starts it."""
    max_shard_size: str | None = None
    """Size limit of a file of weights, such as 5GB or 500MiB; None for the default."""
    text_only: bool = False
    """Whether the text model of a multimodal base is exported alone, without the tower and projector."""


def export(
    source: str | Path,
    out_dir: str | Path,
    layout: serve.ExportFormat = "hf",
    merge: bool = False,
    options: ExportOptions = ExportOptions(),
) -> JsonObject:
    """Write the weights of a run, or of an external model, to `out_dir` and verify them.

        moe_train.export("runs/tuned", "tuned-hf", "hf", merge=True)

    `out_dir` appears complete or not at all.

    Args:
        source: a run or an external model.
        out_dir: the directory to create; it must be empty or not exist yet.
        layout: file layout of a whole model or of an adapter.
        merge: whether to merge the run's adapters into the model.
        options: dtype, server and the rest.

    Returns:
        The record of the verification, which is also kept in `out_dir`.

    Raises:
        ValueError: the layout or the server cannot express the model.
        FileNotFoundError: the run has no checkpoint.
        FileExistsError: `out_dir` exists and is not an empty directory.
        RuntimeError: the verification fails.
    """
    # Before anything below touches a device, as JAX requires.
    join_processes()
    refuse_existing(Path(out_dir))  # fail before the long work rather than after it
    _check_options(layout, options)
    shard_bytes = MAX_SHARD_BYTES
    if options.max_shard_size is not None:
        shard_bytes = _parse_size(options.max_shard_size)
    opened = unquantized_model(open_model(source))
    files = first_files(source)
    if files is not None and (chosen := external.describe_choice(files)):
        log.info("%s", chosen)
    _check_source(opened, layout, merge)
    command = serve_command(options.server, layout, opened, out_dir)
    run = opened.run
    if merge and run and run.lora and run.lora.quantize:
        log.info(
            "the base was quantized (%s) during training; adapters are merged into the unquantized weights of %s",
            run.lora.quantize.name,
            run.init_from,
        )
    dtype = options.dtype or _default_dtype(opened)
    with jax.set_mesh(opened.mesh):
        loaded = opened.to_export()
        origin = origin_of(opened, loaded)
        # Files of llama.cpp hold the text model alone.
        carried = None if options.text_only or layout in ("gguf", "gguf-lora") else carried_of(opened.directory)
        documents = documents_of_export(opened, loaded, Path(out_dir).name, layout, merge, carried)
        origin = origin._replace(texts=origin.texts._replace(documents=documents))
        match layout:
            case "hf" | "mistral" | "gguf":
                write_options = _write_options(source, opened, loaded, layout, origin, replace(options, dtype=dtype))
                write_options = replace(write_options, merge=merge, max_shard_bytes=shard_bytes)
                record = write_and_prove.export_model(loaded.weights, opened.model, out_dir, write_options)
            case "peft" | "mistral-lora" | "gguf-lora":
                adapter_files = AdapterFiles(layout, Path(out_dir).name, dtype, options.server)
                record = export_adapter(opened, loaded.weights, out_dir, adapter_files, origin)
    if opened.run is not None and loaded.step is not None and together.is_first():
        note_export(run_folder(opened.directory), _entry_of(Path(out_dir), layout, loaded.step))
    if command is not None:
        mmproj_name = record.get("mmproj", {}).get("file")
        if mmproj_name is not None:
            command += f" --mmproj {shlex.quote(str(Path(out_dir) / mmproj_name))}"
        record["serve"] = command
    return record


def _write_options(
    source: str | Path,
    opened: OpenedModel,
    loaded: LoadedWeights,
    layout: expected.ModelLayout,
    origin: Origin,
    options: ExportOptions,
) -> write_and_prove.WriteOptions:
    """Return how a whole model is written, with what is carried into its files; the dtype has been chosen."""
    dtype = options.dtype
    assert dtype is not None
    write_and_prove.check_dtype(layout, dtype)
    lost = left_out.report_rounding(source, (opened.compute.param_dtype, dtype))
    wrapping, mmproj, of_base = multimodal_base.parts_of_export(opened, loaded, layout, dtype, options.text_only)
    return write_and_prove.WriteOptions(
        dtype=dtype,
        layout=layout,
        lora=opened.lora,
        texts=origin.texts,
        depth=options.depth,
        conversations=origin.conversations,
        about={**origin.about, **lost, **of_base},
        wrapping=wrapping,
        mmproj=mmproj,
        base=left_out.fp8_base(source),
        encoder=None if wrapping is None else trained_tower_paths(source).encoder,
    )


def _entry_of(out_dir: Path, layout: serve.ExportFormat, step: int) -> ExportEntry:
    """Return the line by which a run remembers this export."""
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return ExportEntry(time, str(out_dir.absolute()), layout, step, hash_of_record(out_dir), tuple(sys.argv))


def _check_source(opened: OpenedModel, layout: serve.ExportFormat, merge: bool) -> None:
    """Raise ValueError if the model cannot be written in the layout."""
    inexpressible = config.without_format(opened.model)
    if inexpressible:
        raise ValueError(
            f"{opened.directory} cannot be exported: no file format can express {inexpressible}; "
            "its weights are only in its checkpoints"
        )
    if opened.model.scores is not None and layout != "hf":
        raise ValueError(
            f"{opened.directory} scores texts with a head of its own, which --format {layout} cannot hold; export the whole model "
            "with --format hf, and with --merge if it has adapters"
        )
    if layout in ("mistral-lora", "gguf-lora") and opened.lora is not None and opened.lora.trains_tower:
        raise ValueError(
            f"{opened.directory} trained modules of a tower, which --format {layout} cannot hold; use --format peft, or "
            "--format hf --merge"
        )
    if layout in get_args(expected.ModelLayout) or (opened.lora is not None and not merge):
        return
    if merge:
        reason = "--merge makes a whole model"
    elif opened.run:
        reason = "it was trained in full, without adapters"
    else:
        reason = "it is not a run"
    raise ValueError(f"{opened.directory} has no adapter to write as {layout}: {reason}; use --format hf")


def _check_options(layout: serve.ExportFormat, options: ExportOptions) -> None:
    """Raise ValueError if an option would have no effect in this layout."""
    if options.dtype is not None and layout in ("peft", "gguf-lora"):
        written = "keeps the dtype of training" if layout == "peft" else "is always float32"
        raise ValueError(f"--dtype {options.dtype} has no effect with --format {layout}, which {written}; leave it out")
    if options.text_only and layout in get_args(expected.AdapterLayout):
        raise ValueError(f"--text-only has no effect with --format {layout}, an adapter of the text model; leave it out")
    if options.max_shard_size is not None and layout != "hf":
        raise ValueError(f"--max-shard-size has no effect with --format {layout}, which writes one file of weights; leave it out")


def unquantized_model(opened: OpenedModel) -> OpenedModel:
    """Return the same model with the weights of the base's files, even if the run held them quantized."""
    lora = opened.lora
    if lora is None or lora.quantize is None:
        return opened
    return opened._replace(lora=lora.model_copy(update={"quantize": None}))


def _default_dtype(opened: OpenedModel) -> FloatDtype:
    """Return the dtype of the files that training started from, so that unchanged weights keep their bytes.

    Without such files it is the dtype of training. FP8 files count as the dtype to which they are dequantized, since training
    quantizes nothing.
    """
    files = opened.run.init_from if opened.run else opened.directory
    if files is not None and not run_folder(files).exists():
        raise FileNotFoundError(
            f"{files}, from which the run started, does not exist here, so the dtype of its files is unknown; state --dtype"
        )
    if files is None:
        return opened.compute.param_dtype
    dtype = dtype_of_files(files, otherwise=opened.compute.param_dtype)
    # bfloat16 weights in memory have lost the bits of float16 files already, and their range is far larger.
    if dtype == "float16" and opened.compute.param_dtype == "bfloat16":
        return "bfloat16"
    return dtype


def _parse_size(size: str) -> int:
    """Parse a size such as 5GB or 500MiB to bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", size.strip())
    unit = SIZE_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ValueError(f"--max-shard-size {size!r} is not a size; state a number and a unit, such as 5GB or 500MiB")
    return int(float(match[1]) * unit)
