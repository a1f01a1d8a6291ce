"""Export the adapters of a run alone, as files of PEFT, of Mistral or of llama.cpp, and verify them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax

from moe_train import config
from moe_train.checkpoint.initial_files import carried_of
from moe_train.checkpoint.model_dir import OpenedModel
from moe_train.checkpoint.runs import is_run, run_folder
from moe_train.commands import write_and_prove
from moe_train.commands.origin_of_export import Origin
from moe_train.machine.files import JsonObject
from moe_train.model.paths import ParameterPath
from moe_train.proof import expected, prove
from moe_train.proof.prove_adapter import AdapterExport, prove_adapter
from moe_train.weights import external, hf, names, peft, serve, together
from moe_train.weights.arrays import LazyParameters
from moe_train.weights.gguf import lora as gguf_lora
from moe_train.weights.mistral import lora as mistral_lora
from moe_train.weights.texts import Texts


class AdapterFiles(NamedTuple):
    """How an adapter alone is written."""

    layout: expected.AdapterLayout
    name: str
    """The adapter's name in the files of llama.cpp."""
    dtype: str
    server: serve.Server | None


def export_adapter(
    opened: OpenedModel, weights: LazyParameters, out_dir: str | Path, files: AdapterFiles, origin: Origin
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
            hugging_face_base(opened),
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


def _write_adapter(directory: Path, files: AdapterFiles, weights: LazyParameters, opened: OpenedModel, texts: Texts) -> None:
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


def hugging_face_base(opened: OpenedModel) -> Path | None:
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
    base = hugging_face_base(opened)
    return hf.is_wrapper(base) if base is not None else carried_of(opened.directory) is not None
