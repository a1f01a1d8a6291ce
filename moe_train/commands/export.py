"""Export a run's checkpoint or an external model, or only an adapter, as files that other tools load, and verify them."""

from __future__ import annotations

import datetime
import hashlib
import logging
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax

from moe_train import config
from moe_train.checkpoint.initial_files import carried_of, first_files
from moe_train.checkpoint.model_dir import LoadedWeights, OpenedModel, dtype_of_files, open_model
from moe_train.checkpoint.runs import is_run, run_folder, saved_config
from moe_train.checkpoint.trained_tower import trained_tower_paths
from moe_train.commands import left_out, multimodal_base, write_and_prove
from moe_train.commands.base_of_adapter import summary_of_hashes
from moe_train.commands.documents import documents_of_export
from moe_train.config import yaml_file
from moe_train.data.pictures.read import open_picture
from moe_train.data.records.answers import judged_conversations
from moe_train.data.records.conversation import normalise
from moe_train.data.records.media import locate_media, references_of
from moe_train.data.records.media_parts import PICTURES
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.open_source import open_source
from moe_train.governance.exports_of_run import ExportEntry, hash_of_record, note_export
from moe_train.machine.files import JsonObject, refuse_existing
from moe_train.machine.mesh import join_processes
from moe_train.model.paths import ParameterPath
from moe_train.proof import expected, prove
from moe_train.proof.prove_adapter import AdapterExport, prove_adapter
from moe_train.weights import external, hf, names, peft, serve, together
from moe_train.weights.arrays import LazyParameters
from moe_train.weights.gguf import lora as gguf_lora
from moe_train.weights.mistral import lora as mistral_lora
from moe_train.weights.on_disk import FloatDtype
from moe_train.weights.safetensors_files import MAX_SHARD_BYTES
from moe_train.weights.texts import Texts

log = logging.getLogger(__name__)

MAX_CONVERSATIONS = 32
"""Number of conversations of the training data whose tokens are compared."""

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


class _Origin(NamedTuple):
    """What both kinds of export write and record in addition to the weights."""

    texts: Texts
    conversations: list[Conversation]
    about: JsonObject


class _AdapterFiles(NamedTuple):
    """How an adapter alone is written."""

    layout: expected.AdapterLayout
    name: str
    """The adapter's name in the files of llama.cpp."""
    dtype: str
    server: serve.Server | None


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
    command = _serve_command(options.server, layout, opened, out_dir)
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
        origin = _origin_of(opened, loaded)
        # Files of llama.cpp hold the text model alone.
        carried = None if options.text_only or layout in ("gguf", "gguf-lora") else carried_of(opened.directory)
        documents = documents_of_export(opened, loaded, Path(out_dir).name, layout, merge, carried)
        origin = origin._replace(texts=origin.texts._replace(documents=documents))
        match layout:
            case "hf" | "mistral" | "gguf":
                write_and_prove.check_dtype(layout, dtype)
                lost = left_out.report_rounding(source, (opened.compute.param_dtype, dtype))
                wrapping, mmproj, of_base = multimodal_base.parts_of_export(opened, loaded, layout, dtype, options.text_only)
                write_options = write_and_prove.WriteOptions(
                    dtype=dtype,
                    layout=layout,
                    lora=opened.lora,
                    merge=merge,
                    texts=origin.texts,
                    max_shard_bytes=shard_bytes,
                    depth=options.depth,
                    conversations=origin.conversations,
                    about={**origin.about, **lost, **of_base},
                    wrapping=wrapping,
                    mmproj=mmproj,
                    base=left_out.fp8_base(source),
                    encoder=None if wrapping is None else trained_tower_paths(source).encoder,
                )
                record = write_and_prove.export_model(loaded.weights, opened.model, out_dir, write_options)
            case "peft" | "mistral-lora" | "gguf-lora":
                adapter_files = _AdapterFiles(layout, Path(out_dir).name, dtype, options.server)
                record = _export_adapter(opened, loaded.weights, out_dir, adapter_files, origin)
    if opened.run is not None and loaded.step is not None and together.is_first():
        note_export(run_folder(opened.directory), _entry_of(Path(out_dir), layout, loaded.step))
    if command is not None:
        mmproj_name = record.get("mmproj", {}).get("file")
        if mmproj_name is not None:
            command += f" --mmproj {shlex.quote(str(Path(out_dir) / mmproj_name))}"
        record["serve"] = command
    return record


def _entry_of(out_dir: Path, layout: serve.ExportFormat, step: int) -> ExportEntry:
    """Return the line by which a run remembers this export."""
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return ExportEntry(time, str(out_dir.absolute()), layout, step, hash_of_record(out_dir), tuple(sys.argv))


def _origin_of(opened: OpenedModel, loaded: LoadedWeights) -> _Origin:
    """Return the tokenizer, config, conversations and origin of a run or an external model."""
    run = opened.run
    if run is None:
        return _Origin(Texts(opened.tokenizer, opened.chat_template), [], _about(opened, loaded))
    texts = Texts(opened.tokenizer, opened.chat_template, _config_text(opened, loaded))
    return _Origin(texts, list(islice(_conversations(run), MAX_CONVERSATIONS)), _about(opened, loaded))


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


def _export_adapter(
    opened: OpenedModel, weights: LazyParameters, out_dir: str | Path, files: _AdapterFiles, origin: _Origin
) -> JsonObject:
    """Write the adapter of a run and verify it, on the mesh in force; returns the record."""
    lora = opened.lora
    assert lora is not None  # `_check_source` has refused models without adapters
    if jax.process_count() > 1:
        # The first process alone writes an adapter, so it needs all of it.
        weights = together.gather_on_each_process(
            {path: x for path, x in weights.items() if ParameterPath.parse(path).is_trained(lora)}
        )
    with together.one_directory(out_dir) as directory:
        with together.all_or_none():
            if together.is_first():
                _write_adapter(directory, files, weights, opened, origin.texts)
        exported = AdapterExport(
            directory,
            files.layout,
            weights,
            opened.model,
            lora,
            opened.tokenizer,
            opened.chat_template,
            origin.conversations,
            origin.about,
            _hugging_face_base(opened),
            _is_on_wrapper(opened),
            _adapted_tower(opened),
        )
        # Within the block, so that an adapter that fails its checks never appears as `out_dir`.
        record = prove_adapter(exported)
        if together.is_first():
            prove.write_record(directory, record)
    return record


def _adapted_tower(opened: OpenedModel) -> config.Encoder | None:
    """Return the tower that a run's adapters change; None if they leave it as it was."""
    return opened.encoder if opened.lora is not None and opened.lora.trains_tower else None


def _write_adapter(directory: Path, files: _AdapterFiles, weights: LazyParameters, opened: OpenedModel, texts: Texts) -> None:
    """Replace the empty directory by a complete adapter."""
    model = opened.model
    lora = opened.lora
    run = opened.run
    assert lora is not None and run is not None  # only runs have adapters here
    assert run.init_from is not None  # adapters belong to weights that can be loaded again
    base = str(run_folder(run.init_from))
    match files.layout:
        case "peft":
            names_of_base = _names_of_base(opened)
            peft.export_adapter(
                weights,
                model,
                lora,
                directory,
                base_model=base,
                layout=names_of_base,
                encoder=_adapted_tower(opened),
                texts=texts,
                server=files.server,
            )
        case "mistral-lora":
            dtype = write_and_prove.checked_float_dtype(files.layout, files.dtype)
            mistral_lora.export_adapter(weights, model, lora, directory, dtype=dtype, texts=texts)
        case "gguf-lora":
            gguf_lora.export_adapter(weights, model, lora, directory, base_model=base, name=files.name, texts=texts)


def _hugging_face_base(opened: OpenedModel) -> Path | None:
    """Return the folder of a run's base if it is in Hugging Face's layout; None if it has to be exported to that first."""
    base = opened.run.init_from if opened.run else None
    if base is None or is_run(base) or external.layout_of(base) != "hf":
        return None
    return Path(base)


def _names_of_base(opened: OpenedModel) -> names.TensorLayout:
    """Return the names that transformers gives to the modules of a run's base."""
    # Within a wrapper with a vision tower, the modules of the text model have another prefix.
    return names.WRAPPED if _is_on_wrapper(opened) else names.HUGGING_FACE


def _is_on_wrapper(opened: OpenedModel) -> bool:
    """Return whether transformers loads a run's base, or the export of it, as a multimodal model."""
    base = _hugging_face_base(opened)
    return hf.is_wrapper(base) if base is not None else carried_of(opened.directory) is not None


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


def _serve_command(server: serve.Server | None, layout: serve.ExportFormat, opened: OpenedModel, out_dir: str | Path) -> str | None:
    """Return the command that starts `server` on the export; None without a server.

    vLLM and transformers need the base in Hugging Face's layout, so for another base the command exports it first.
    """
    if server is None:
        return None
    run = opened.run
    rank = 1
    if opened.lora:
        # vLLM has to be started with the largest rank that it serves (--max-lora-rank).
        rank = max((target.rank for target in opened.lora.targets), default=1)
    kind: Literal["huggingface", "mistral"] = "mistral"
    if opened.tokenizer.chat_template is not None:
        kind = "huggingface"
    base = run.init_from if run else None
    base_export = ""
    if layout == "peft" and base is not None and _hugging_face_base(opened) is None:
        # A placeholder: only the user knows where the base should go.
        base_export = f"moe-train export {shlex.quote(base)} BASE_MODEL && "
        base = None
    base_folder = _hugging_face_base(opened)
    wrapper = None if base_folder is None else hf.find_wrapper(base_folder)
    auto_class = "AutoModelForCausalLM" if wrapper is None else wrapper.auto_class
    served = serve.ServedExport(
        layout,
        opened.model,
        out_dir,
        base_model=base,
        rank=rank,
        tokenizer=kind,
        auto_class=auto_class,
        tool_parser=_tool_parser(opened),
    )
    return base_export + serve.serving_command(server, served)


def _tool_parser(opened: OpenedModel) -> serve.ToolParser | None:
    """Return the format of the model's tool calls; None if its chat format has none."""
    if opened.chat_template is not None:
        return serve.tool_parser_of(opened.chat_template)
    controls = sorted(opened.tokenizer.control_ids)
    return serve.tool_parser_of(opened.tokenizer.decode(controls, keep_special=True))


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


def _config_text(opened: OpenedModel, loaded: LoadedWeights) -> str:
    """Return the config that the loaded checkpoint was saved with, as YAML."""
    assert loaded.about is not None  # only called for runs
    return yaml_file.dump(config.run_of(saved_config(opened.directory, loaded.about)).to_config())


def _about(opened: OpenedModel, loaded: LoadedWeights) -> JsonObject:
    """Return what the record states about the origin of the weights: the checkpoint that they were read from."""
    about = loaded.about
    if opened.run is None or about is None:
        return {"source": str(opened.directory)}
    origin: JsonObject = {"source": str(run_folder(opened.directory))}
    origin |= {"run": opened.run.name, "step": loaded.step, "data_sha256": about.data, "manifest_sha256": about.manifest}
    # Of the same text that is written as the export's config.
    origin["config_sha256"] = hashlib.sha256(_config_text(opened, loaded).encode()).hexdigest()
    if about.base is not None:
        origin["base"] = {
            "source": about.base.source,
            "step": about.base.step,
            "sha256": summary_of_hashes(about.base.hashes),
        }
    return origin


def _conversations(run: config.Run) -> Iterator[Conversation]:
    """Yield the conversations of the training data that are in local files."""
    # The comparison is an extra check, so data that are elsewhere or gone do not stop an export.
    for source in run.data.train if isinstance(run.data, config.RunData) else ():
        if not isinstance(source, config.FileSource) or isinstance(source.record, config.TextRecord):
            continue
        try:
            records = open_source(source)
            for origin, fields in records:
                normal = normalise(fields, source.record)
                locate_media(normal, records.folder(origin.place))
                for conversation in judged_conversations(normal):
                    for reference in references_of(conversation.messages, PICTURES):
                        open_picture(reference)
                    yield conversation
        except (FileNotFoundError, ValueError) as error:
            log.warning("training conversations of one source cannot be read, so the export is not compared on them: %s", error)


def _parse_size(size: str) -> int:
    """Parse a size such as 5GB or 500MiB to bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", size.strip())
    unit = SIZE_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ValueError(f"--max-shard-size {size!r} is not a size; state a number and a unit, such as 5GB or 500MiB")
    return int(float(match[1]) * unit)
