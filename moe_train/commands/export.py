"""Export a run's newest checkpoint or an external model as files that other tools load: a whole model or an adapter, proved."""

from __future__ import annotations

import hashlib
import logging
import re
import shlex
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import jax

from moe_train import config
from moe_train.checkpoint import manager
from moe_train.checkpoint.model_dir import Opened, dtype_of_files, open_model
from moe_train.checkpoint.runs import is_run
from moe_train.commands import write_and_prove
from moe_train.config import yaml_file
from moe_train.data.records.conversation import normalise, trainable
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.open_source import open_source
from moe_train.machine.files import refuse_existing
from moe_train.machine.mesh import join_processes
from moe_train.model.paths import ParameterPath
from moe_train.proof import expected, prove
from moe_train.weights import external, peft, serve, together
from moe_train.weights.arrays import Held
from moe_train.weights.gguf import lora as gguf_lora
from moe_train.weights.mistral import lora as mistral_lora
from moe_train.weights.safetensors_files import MAX_SHARD_BYTES
from moe_train.weights.texts import Texts

log = logging.getLogger(__name__)
CONVERSATIONS = 32
"""Number of conversations of the training data whose tokens are compared."""


def export(
    source: str | Path,
    out_dir: str | Path,
    layout: serve.Layout = "hf",
    merge: bool = False,
    *,
    dtype: str | None = None,
    depth: prove.Depth = "full",
    server: serve.Server | None = None,
    max_shard_size: str | None = None,
) -> dict[str, Any]:
    """Write the weights of a run, or of an external model, to `out_dir` and prove them.

    `out_dir` appears complete or not at all.

    Args:
        source: a run or an external model.
        out_dir: the folder to write; it must be empty or not exist yet.
        layout: file layout of a whole model or of an adapter.
        merge: whether to merge the run's adapters into the model.
        dtype: dtype of the files; None for the dtype of the files that the weights came from, or else that of training.
        depth: `tensors` does not run the model for the proof.
        server: the server that is to read the files; the record then has `serve`, the command that starts it.
        max_shard_size: such as 5GB or 500MiB; None for the default.

    Returns:
        The record that the proof keeps in `out_dir`.

    Raises:
        ValueError: the layout or the server cannot express the model.
        FileNotFoundError: the run has no checkpoint.
        FileExistsError: `out_dir` exists and is not an empty folder.
        RuntimeError: the proof fails.
    """
    join_processes()
    refuse_existing(Path(out_dir))  # fail before the long work rather than after it
    shard_bytes = MAX_SHARD_BYTES if max_shard_size is None else _bytes(max_shard_size)
    opened = unquantised(open_model(source))
    run = opened.run
    lora = opened.lora
    model = opened.model
    if merge and run and run.lora and run.lora.quantize:
        log.info("trained beside weights in %s; merged into those of %s as they are there", run.lora.quantize.name, run.init_from)
    inexpressible = config.without_format(model)
    if inexpressible:
        raise ValueError(
            f"{source} cannot be exported: no file format has a place for {inexpressible}; its weights are in its checkpoints"
        )
    whole_model = layout in get_args(expected.Model)
    if not whole_model and (lora is None or merge):
        if merge:
            reason = "--merge makes a whole model"
        elif run:
            reason = "it was trained in full"
        else:
            reason = "it is no run"
        raise ValueError(f"{source} gives no adapter: {reason}; use --format hf")
    command = _command(server, layout, opened, out_dir)
    texts = Texts(opened.tokenizer, opened.chat_template, yaml_file.dump(run.to_config()) if run else None)
    conversations = list(islice(_conversations(run), CONVERSATIONS)) if run else []
    filetype = dtype or _dtype(opened)
    about = _about(opened)
    with jax.set_mesh(opened.mesh):
        weights = opened.to_export()
        if whole_model:
            record = write_and_prove.export(
                weights,
                model,
                out_dir,
                layout,  # type: ignore[arg-type]
                dtype=filetype,
                lora=lora,
                merge=merge,
                texts=texts,
                max_shard_bytes=shard_bytes,
                depth=depth,
                conversations=conversations,
                about=about,
            )
        else:
            assert lora is not None and run is not None
            if jax.process_count() > 1:
                # The first process alone writes an adapter, so it needs all of it.
                weights = together.gathered({path: x for path, x in weights.items() if ParameterPath.parse(path).is_trained(lora)})
            with together.one_directory(out_dir) as directory:
                with together.all_or_none():
                    if together.is_first():
                        _write_adapter(directory, layout, weights, opened, filetype, texts, server, Path(out_dir).name)
                record = prove.prove_adapter(
                    *(directory, layout, weights, model, lora, opened.tokenizer, opened.chat_template, conversations, about)  # type: ignore[arg-type]
                )
                if together.is_first():
                    prove.write(directory, record)
    return record | ({"serve": command} if command else {})


def _write_adapter(
    directory: Path,
    layout: serve.Layout,
    weights: Held,
    opened: Opened,
    filetype: str,
    texts: Texts,
    server: serve.Server | None,
    name: str,
) -> None:
    """Replace the empty directory by a complete adapter."""
    model = opened.model
    lora = opened.lora
    run = opened.run
    assert lora is not None and run is not None
    base = str(run.init_from)
    match layout:
        case "peft":
            peft.export_adapter(weights, model, lora, directory, base_model=base, texts=texts, server=server)
        case "mistral-lora":
            mistral_lora.export_adapter(weights, model, lora, directory, dtype=_checked_dtype(filetype), texts=texts)
        case "gguf-lora":
            gguf_lora.export_adapter(weights, model, lora, directory, base_model=base, name=name, texts=texts)
        case _:
            raise AssertionError(layout)


def unquantised(opened: Opened) -> Opened:
    """Return the same model with the weights of the base's files, even if the run held them quantized."""
    lora = opened.lora
    if lora is None or lora.quantize is None:
        return opened
    return opened._replace(lora=lora.model_copy(update={"quantize": None}))


def _command(server: serve.Server | None, layout: serve.Layout, opened: Opened, out_dir: str | Path) -> str | None:
    """Return the command that starts `server` on the export; None without a server.

    vLLM and transformers need the base in Hugging Face's layout, so for another base the command exports it first.
    """
    if server is None:
        return None
    run = opened.run
    rank = 1
    if opened.lora:
        rank = max((target.rank for target in opened.lora.targets), default=1)
    kind = "huggingface" if opened.tokenizer.chat_template is not None else "mistral"
    base = run.init_from if run else None
    base_export = ""
    if layout == "peft" and base is not None and (is_run(base) or external.layout_of(base) != "hf"):
        base_export = f"moe-train export {shlex.quote(base)} BASE_MODEL && "
        base = None
    return base_export + serve.command(server, layout, opened.model, out_dir, base_model=base, rank=rank, tokenizer=kind)  # type: ignore[arg-type]


def _checked_dtype(dtype: str) -> config.Dtype:
    for supported in get_args(config.Dtype):
        if dtype == supported:
            return supported
    raise ValueError(f"dtype {dtype} is not one of this layout's, which are {', '.join(get_args(config.Dtype))}")


def _dtype(opened: Opened) -> config.Dtype:
    """Return the dtype of the files that training started from, so that unchanged weights keep their bytes.

    Without such files it is the dtype of training.
    """
    files = opened.run.init_from if opened.run else opened.directory
    if files is not None and not Path(files).exists():
        raise FileNotFoundError(
            f"{files}, from which the run started, is not here to say the dtype of the files; state it (--dtype)"
        )
    if files is None:
        return opened.compute.param_dtype
    return dtype_of_files(files, otherwise=opened.compute.param_dtype)


def _about(opened: Opened) -> dict[str, Any]:
    """Return what the record states about the origin of the weights."""
    origin: dict[str, Any] = {"source": str(opened.directory)}
    if opened.run is None:
        return origin
    with manager.reading(opened.directory) as checkpoints:
        step = checkpoints.latest_step()
        about = manager.newest(checkpoints)
    assert about is not None
    origin |= {"run": opened.run.name, "step": step, "data_sha256": about.data, "manifest_sha256": about.manifest}
    origin["config_sha256"] = hashlib.sha256(yaml_file.dump(opened.run.to_config()).encode()).hexdigest()
    if about.base is not None:
        hashes = "".join(f"{name} {digest}\n" for name, digest in sorted(about.base.hashes.items()))
        origin["base"] = {
            "source": about.base.source,
            "step": about.base.step,
            "sha256": hashlib.sha256(hashes.encode()).hexdigest(),
        }
    return origin


def _conversations(run: config.Run) -> Iterator[Conversation]:
    """Yield the conversations of the training data that are in local files."""
    for source in run.data.train if isinstance(run.data, config.RunData) else ():
        if not isinstance(source, config.FileSource) or isinstance(source.record, config.TextRecord):
            continue
        try:
            for _, fields in open_source(source):
                conversation = trainable(normalise(fields, source.record))
                assert isinstance(conversation, Conversation)
                yield conversation
        except (FileNotFoundError, ValueError) as error:
            log.warning("the template is not tried on training conversations of one source: %s", error)


def _bytes(size: str) -> int:
    """Parse a size such as 5GB or 500MiB."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"([0-9.]+) *([A-Za-z]*)", size.strip())
    if match is None or match[2].upper() not in units or float(match[1]) * units[match[2].upper()] < 1:
        raise ValueError(f"max-shard-size is {size!r}; say it like 5GB or 500MiB")
    return int(float(match[1]) * units[match[2].upper()])
