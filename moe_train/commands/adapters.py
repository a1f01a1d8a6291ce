"""Merge adapters into their base, and scale them; from a run or from external files."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax

from moe_train import config
from moe_train.checkpoint import model_dir, runs
from moe_train.checkpoint.metadata import WeightOrigin
from moe_train.checkpoint.trained_tower import trained_tower_paths
from moe_train.commands import left_out, multimodal_base, write_and_prove
from moe_train.commands.base_of_adapter import warn_of_another_base
from moe_train.machine.files import JsonObject, new_directory, refuse_existing
from moe_train.model.parameters import parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.transformer import abstract_model
from moe_train.proof.scaled import prove_scaled
from moe_train.weights import peft, texts
from moe_train.weights.arrays import LazyParameters
from moe_train.weights.on_disk import FileDtype


def merge_into(
    base: str | Path, source: str | Path, out_dir: str | Path, dtype: FileDtype | None = None, text_only: bool = False
) -> JsonObject:
    """Merge the adapters of `source` into the base model, write it in Hugging Face format, and verify it.

    Args:
        base: the base model.
        source: a run or an external adapter.
        out_dir: the folder to write; it must be empty or not exist yet.
        dtype: dtype of the files; None for the dtype of the base's files.
        text_only: whether the text model of a multimodal base is written alone, without the tower and projector.

    Returns:
        The record of the verification.

    Raises:
        ValueError: the base is a run with adapters of its own. Other errors are those of `write_and_prove.export_model`.
    """
    refuse_existing(Path(out_dir))  # fail before the long work rather than after it
    opened = model_dir.open_model(base)
    if opened.lora is not None:
        raise ValueError(f"BASE {base} is a run with adapters of its own; export it with --merge, and merge into that export")
    dtype = dtype or model_dir.dtype_of_files(base, otherwise=opened.compute.param_dtype)
    with jax.set_mesh(opened.mesh):
        encoder = model_dir.encoder_of(base)
        lora, weights = base_and_adapter(base, source, opened.model, dtype, encoder)
        # Warnings come after the files have been read, so that an error is alone.
        lost = left_out.report_rounding(base, (dtype, dtype))
        text = multimodal_base.TextOfExport(opened.model, opened.tokenizer, opened.chat_template)
        tower = multimodal_base.trained_tower_of(weights, lora, dtype)
        wrapping = multimodal_base.find_wrapping(base, "hf", text, None, text_only, tower)
        if text_only:
            lost |= left_out.report_left_out(base, "--text-only writes the text model alone")
        warn_of_another_base(base, source)
        options = write_and_prove.WriteOptions(
            dtype=dtype,
            lora=lora,
            merge=True,
            texts=texts.Texts(opened.tokenizer, opened.chat_template),
            about={"source": str(base), "adapter": str(source), **lost},
            wrapping=wrapping,
            base=left_out.fp8_base(base),
            encoder=None if tower is None or wrapping is None else encoder,
        )
        return write_and_prove.export_model(weights, opened.model, out_dir, options)


def base_and_adapter(
    base: str | Path,
    source: str | Path,
    model: config.Model,
    dtype: FileDtype | None = None,
    encoder: config.Encoder | None = None,
) -> tuple[config.Lora, LazyParameters]:
    """Load a base model and adapters for it; the mesh must be in force.

    Args:
        base: the base model.
        source: a run or an external adapter.
        model: the architecture of the base.
        dtype: dtype of the base's weights; None, or fp8, for the dtype of its files.
        encoder: the base's tower, which the adapters may adapt; None without one that is computed.

    Returns:
        (the section `lora` of the adapters, the weights of base and adapters). Weights in external files are read lazily. Of a
        tower they have what training has changed.
    """
    if dtype is None or dtype == "fp8":
        dtype = model_dir.dtype_of_files(base, otherwise=model_dir.default_compute().param_dtype)
    # float32 holds every number of a float16 file.
    compute = config.Compute(param_dtype="float32" if dtype == "float16" else dtype)
    lora = model_dir.read_adapter(source, model, encoder).model_copy(update={"quantize": None})
    shapes = parameters(abstract_model(model, compute, lora, encoder))[1]
    trained = model_dir.load_adapter(WeightOrigin(str(source), None, {}), model, shapes, encoder)
    # Of a tower, what the base's own training has not changed either is carried as bytes.
    _, tower_of_base = trained_tower_paths(base)
    frozen_shapes: dict[str, Any] = {}
    for name, shape in shapes.items():
        path = ParameterPath.parse(name)
        is_carried = path.is_tower and not path.has_adapter(trained) and name not in tower_of_base
        if not path.is_trained(lora) and not is_carried:
            frozen_shapes[name] = shape
    # Loaded lazily, since the base may be larger than the host's memory.
    frozen = model_dir.load_parameters(base, frozen_shapes, load=model_dir.load_lazily)
    return lora, {**frozen, **trained}


def scale(source: str | Path, factor: float, out_dir: str | Path) -> JsonObject:
    """Write a PEFT adapter whose deltas are `factor` times as large, and verify it.

    Only the alphas are multiplied; the tensors keep their bytes.

    Raises:
        ValueError: the factor is not positive, modules were trained in full (these have no scale), or the verification fails.
        FileNotFoundError: `source` has no PEFT adapter.
    """
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"FACTOR {factor} is not a positive number; 1 would keep the adapter as it is")
    directory = Path(source)
    if runs.is_run(directory):
        raise ValueError(f"{source} is a run; export its adapter with --format peft, and scale the export")
    settings = peft.read_settings(directory)
    if settings.get("modules_to_save"):
        raise ValueError(
            f"{source} has modules trained in full ({settings['modules_to_save']}), which have no scale; merge the adapter instead"
        )
    # A delta is alpha / rank · B·A (or over the square root of rank), so alphas alone scale it.
    settings["lora_alpha"] *= factor
    settings["alpha_pattern"] = {key: alpha * factor for key, alpha in (settings.get("alpha_pattern") or {}).items()}
    with new_directory(out_dir) as unfinished:
        for file in directory.iterdir():
            # The old proof is about the old scale.
            if file.is_file() and file.name not in (peft.ADAPTER_CONFIG, "export_proof.json"):
                shutil.copyfile(file, unfinished / file.name)
        (unfinished / peft.ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        prove_scaled(unfinished, directory, factor)
    return {"adapter": str(out_dir), "lora_alpha": settings["lora_alpha"], "alpha_pattern": settings["alpha_pattern"]}
