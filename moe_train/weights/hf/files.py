"""Open Hugging Face models, and write them in the layout that transformers 4 and 5, vLLM and llama.cpp load."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_train import config
from moe_train.data.tokenizers.padding import padding_id
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import JsonObject, read_object
from moe_train.weights import fp8, names, on_disk, safetensors_files
from moe_train.weights.fp8.scheme import Fp8Scheme
from moe_train.weights.fp8.sections import DEFAULT_BLOCK
from moe_train.weights.hf.config_json import read_model_config, write_model_config
from moe_train.weights.hf.config_keys import CONFIG_FILE, wrapper_class
from moe_train.weights.on_disk import Carried, WeightFiles
from moe_train.weights.wrappers import towers
from moe_train.weights.wrappers.carry import Wrapping

log = logging.getLogger(__name__)


def open_weights(directory: str | Path) -> WeightFiles:
    """Open a model's directory, single file or shards. Raises ValueError if a tied model has a different head of its own."""
    model = read_model_config(directory)
    tensors, outside_text = open_tensors(directory)
    if model.tie_embeddings:
        _drop_copied_head(directory, tensors)
    names.check_counts(directory, model, tensors)
    pieces = names.weight_pieces(model, names.detect_hugging_face(tensors))
    return WeightFiles(Path(directory), model, pieces, tensors, _carried(directory, model, outside_text))


def _drop_copied_head(directory: str | Path, tensors: dict[str, on_disk.StoredTensor]) -> None:
    """Remove a copy of a tied head, which some tools write. Raises ValueError if it differs from the embedding."""
    heads = [name for name in tensors if name.endswith("lm_head.weight")]
    embeddings = [name for name in tensors if name.endswith("embed_tokens.weight")]
    for head in heads:
        if not embeddings or not on_disk.have_same_content(tensors[head], tensors[embeddings[0]]):
            raise ValueError(
                f"{directory} has a {head} that differs from the embedding, but tie_word_embeddings is true in its config.json; "
                "set it to false, or remove the tensor"
            )
        del tensors[head]


class OpenedTensors(NamedTuple):
    """The tensors of a model's folder."""

    of_text: dict[str, on_disk.StoredTensor]
    """Tensors of the text model by name; FP8 ones are dequantized when they are read."""
    outside_text: dict[str, safetensors_files.SafetensorsTensor]
    """Tensors of the tower and projector of a multimodal model, of any dtype, by name."""


def open_tensors(directory: str | Path) -> OpenedTensors:
    """Open the tensors of a model's folder, those of its text model apart from the others."""
    text: dict[str, safetensors_files.SafetensorsTensor] = {}
    outside_text: dict[str, safetensors_files.SafetensorsTensor] = {}
    for name, tensor in safetensors_files.open_model_tensors(directory, is_carried=_is_outside_text).items():
        if _is_outside_text(name):
            outside_text[name] = tensor
        elif not any(part in name for part in names.RECOMPUTED):
            text[name] = tensor
    return OpenedTensors(fp8.dequantize_tensors(text, fp8.section_of_folder(Path(directory) / CONFIG_FILE)), outside_text)


def _is_outside_text(name: str) -> bool:
    return any(part in name for part in names.OUTSIDE_TEXT)


def _carried(directory: str | Path, model: config.Model, tensors: dict[str, safetensors_files.SafetensorsTensor]) -> Carried | None:
    """Return the parts of a multimodal model around its text model; None for a text model.

    Raises:
        ValueError: they are not those that config.json describes.
    """
    file = Path(directory) / CONFIG_FILE
    fields = read_object(file)
    wrapper = wrapper_class(fields)
    if wrapper is None:
        if tensors:
            raise ValueError(
                f"{directory} has {next(iter(tensors))}, but its {CONFIG_FILE} describes a text model alone; restore that of the "
                "multimodal model"
            )
        return None
    try:
        settings = towers.settings_of(wrapper, fields, model.model_dim)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    # In memory, and in files of some tools, names begin with `model.`, which transformers does not write.
    in_files = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    expected = {tensor.name: tensor.shape for tensor in towers.tower_tensors(settings)}
    towers.check_complete(directory, expected, {name: tensor.shape for name, tensor in in_files.items()})
    return Carried(wrapper.parts, "hf", wrapper, fields, settings, in_files)


def write(
    directory: Path,
    model: config.Model,
    dtype: on_disk.FileDtype,
    matrix: Callable[[names.WeightPiece], np.ndarray],
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = safetensors_files.MAX_SHARD_BYTES,
    share: safetensors_files.WriterShare = safetensors_files.SOLE_WRITER,
    wrapping: Wrapping | None = None,
) -> None:
    """Write shards, their index, config.json and generation_config.json.

    Args:
        directory: the folder.
        model: the architecture.
        dtype: dtype of the files.
        matrix: returns the values of a piece in `fp8.dtype_before_writing`; called for one piece at a time.
        tokenizer: states the ids of control tokens; None if the export has none.
        max_shard_bytes: size limit of a shard.
        share: the part of one of several processes that write together.
        wrapping: the other parts of a multimodal model; None for a text model.
    """
    bos_id, eos_id = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (None, None)
    settings = write_model_config(
        model,
        # Tensors that FP8 leaves out are bfloat16.
        dtype="bfloat16" if dtype == "fp8" else dtype,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        # transformers reads the score at the last token that is not this one.
        pad_token_id=padding_id(tokenizer) if tokenizer is not None and model.scores is not None else None,
    )
    generation = {key: settings[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    layout = names.hugging_face_of(model) if wrapping is None else wrapping.text_layout
    pieces = names.weight_pieces(model, layout)
    scheme = fp8.scheme.hugging_face_scheme(pieces)
    if dtype == "fp8":
        settings["quantization_config"] = fp8.scheme.hugging_face_section(pieces, scheme)
        _warn_of_readers(model, scheme, is_wrapped=wrapping is not None)
    specs, values = fp8.tensors_of_dtype(pieces, dtype, matrix, scheme)
    carried = {} if wrapping is None else wrapping.tensors
    specs += [safetensors_files.TensorSpec(name, tensor.base.shape, tensor.base.dtype) for name, tensor in carried.items()]

    def array(spec: safetensors_files.TensorSpec) -> safetensors_files.TensorValues:
        """Return a tensor of the text model, or one that is carried."""
        return carried[spec.name].read() if spec.name in carried else values(spec)

    safetensors_files.write_shards(directory, specs, array, max_shard_bytes, share)
    # The first process writes the small files for all.
    if share.first != 0:
        return
    write_json(directory / CONFIG_FILE, settings if wrapping is None else wrapping.around(settings))
    if model.scores is not None:
        return
    # A chat may end its turns with another token than EOS; config.json keeps the single one.
    if tokenizer is not None and len(tokenizer.end_ids) > 1:
        generation["eos_token_id"] = list(tokenizer.end_ids)
    # Without this file, servers generate past the end of an answer.
    write_json(directory / "generation_config.json", {"_from_model_config": True, **generation})


def _warn_of_readers(model: config.Model, scheme: Fp8Scheme, is_wrapped: bool) -> None:
    """Warn of readers that refuse FP8 files of this kind, or read them wrongly."""
    if model.family == "mistral4":
        log.warning(
            "transformers reads the scales of FP8 experts only on a GPU of compute capability 8.9 or more; elsewhere it reports "
            "them as UNEXPECTED and computes without them: use --dtype bfloat16 for such machines"
        )
    elif scheme.block is None and not is_wrapped:
        log.warning(
            "blocks of %d x %d, which vLLM needs in FP8 files, do not divide most matrices of this model, so there is one scale "
            "per tensor, which transformers reads; use --dtype bfloat16 for vLLM",
            *DEFAULT_BLOCK,
        )


def write_json(file: Path, value: JsonObject) -> None:
    """Write a JSON file with indentation."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
