"""GGUF models, as llama.cpp and Ollama run them: opened (quantized ones too) and written.

What llama.cpp (v0.5.0) accepts, according to tests and its source, decides what is written:
- Rotary pairs are adjacent; experts are stacked, one tensor per matrix and layer. llama.cpp no longer reads older files with one
  tensor per expert; this package does.
- Norms and the router are F32 in a file of any type. Other matrices have the file's type, or F16 if their rows do not divide
  into Q8_0's blocks of 32. Embeddings and head are no exception.
- A tied head is left out. Unknown keys are ignored. For the other keys see gguf_settings.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from moe_train import config
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import new_directory
from moe_train.model.paths import ParameterPath
from moe_train.weights import names, together
from moe_train.weights.gguf import chat_format, container, latent_tensors, ollama
from moe_train.weights.gguf import settings as gguf_settings
from moe_train.weights.gguf import tokenizer as gguf_tokenizer
from moe_train.weights.on_disk import FileTensor, WeightFiles

log = logging.getLogger(__name__)

MODEL_FILE = "model.gguf"
"""Name of the file that is written."""
ReadPiece = Callable[[names.WeightPiece, np.dtype], np.ndarray]
"""Returns the values of a piece of the file's tensors, rounded once to a dtype."""

# name on the command line -> (type of matrices, llama.cpp's code of such a file)
_TYPES = {"f32": ("F32", 0), "f16": ("F16", 1), "q8_0": ("Q8_0", 7), "bf16": ("BF16", 32)}
_ALIASES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
QUANTIZE_TOOL = "llama-quantize"
"""Name of llama.cpp's quantization tool."""

_PER_EXPERT = replace(
    names.GGUF,
    experts=tuple(row._replace(name=row.name.replace("_exps.weight", ".{e}.weight"), stack="") for row in names.GGUF.experts),
)
"""The layout of files from before April 2024."""
_FUSED = replace(
    names.GGUF,
    experts=(
        names.Row("ffn_gate_up_exps.weight", "F D", "ffn.gate_proj.weight", "D F", "gate of gate_up"),
        names.Row("ffn_gate_up_exps.weight", "F D", "ffn.up_proj.weight", "D F", "up of gate_up"),
        names.GGUF.experts[2],
    ),
)
"""The layout of files whose gate and up projections are stacked in one tensor; only read."""


# --- reading -----------------------------------------------------------------------------------------------------


def file_in(path: str | Path) -> Path | None:
    """Return the GGUF file that a path refers to: the path itself, or the only model in a folder.

    Returns:
        None if the folder has no GGUF file, or several.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return path
    files = [file for file in sorted(path.glob("*.gguf")) if not is_mmproj(file)] if path.is_dir() else []
    return files[0] if len(files) == 1 else None


def is_mmproj(file: Path) -> bool:
    """Return whether a file is named like llama.cpp's files of a vision or audio tower, which hold no text model."""
    return "mmproj" in file.name.lower()


def open_weights(path: str | Path) -> WeightFiles:
    """Open a model of one file, or of the only file in a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged, or its architecture is not implemented here.
    """
    opened = _open(path)
    model = gguf_settings.read_architecture(opened)
    tensors: Mapping[str, FileTensor] = opened.tensors
    if isinstance(model.attention, config.MultiHeadLatentAttention):
        try:
            tensors = latent_tensors.join_latents(tensors)
        except ValueError as error:
            raise ValueError(f"{opened.file}: {error}") from error
    names.check_counts(path, model, tensors)
    return WeightFiles(opened.file, model, names.weight_pieces(model, _layout_of(tensors)), tensors)


def _layout_of(tensors: Collection[str]) -> names.TensorLayout:
    """Return the layout of a file's experts, given the names of its tensors."""
    # One expert's gate tells: newer files have all experts in blk.0.ffn_gate_exps.weight.
    if "blk.0.ffn_gate.0.weight" in tensors:
        return _PER_EXPERT
    if any(name.endswith(".ffn_gate_up_exps.weight") for name in tensors):
        return _FUSED
    return names.GGUF


def read_model_config(path: str | Path) -> config.Model:
    """Read the architecture of a GGUF file."""
    return gguf_settings.read_architecture(_open(path))


def unpack_tokenizer(file: Path) -> Path:
    """Convert the tokenizer of a file to a Hugging Face tokenizer in a folder next to it, unless that folder exists.

    The folder's name contains a hash of the tokenizer, so that it is never used for another file's.

    Returns:
        The folder.

    Raises:
        ValueError: the tokenizer is not supported, or the folder cannot be written.
    """
    tokenizer_keys = gguf_tokenizer.tokenizer_keys(container.open_gguf(file).settings)
    folder = file.with_name(f"{file.stem}.tokenizer-{gguf_tokenizer.tokenizer_hash(tokenizer_keys)[:8]}")
    if not folder.is_dir():
        try:
            with new_directory(folder) as directory:
                gguf_tokenizer.extract_tokenizer(tokenizer_keys, directory, file)
        except FileExistsError:
            log.info("another process has just unpacked %s", folder)
        except OSError as error:
            if not isinstance(error, PermissionError) and error.errno != errno.EROFS:
                raise
            raise ValueError(
                f"{folder} cannot be written, and {file} has its tokenizer inside; name a tokenizer in data.tokenizer"
            ) from error
    return folder


def _open(path: str | Path) -> container.Gguf:
    """Open the file that a path refers to. Raises FileNotFoundError if there is none, or several."""
    file = file_in(path)
    if file is None:
        raise FileNotFoundError(f"{path} has no GGUF file, or several; name the file")
    return container.open_gguf(file)


# --- writing -----------------------------------------------------------------------------------------------------


def write(
    directory: Path,
    model: config.Model,
    dtype: str,
    matrix: ReadPiece,
    tokenizer: Tokenizer | None = None,
    chat_template: str | None = None,
    name: str = "model",
) -> None:
    """Write `model.gguf`, and a `Modelfile` for Ollama. One matrix is in memory at a time.

    If several processes hold the weights, all of them call this, and the first one writes.

    Args:
        directory: the folder.
        model: the architecture.
        dtype: f32, f16, bf16, q8_0, or what llama.cpp's own tool makes from bf16 (q4_k_m, q6_k, …), if it is installed.
        matrix: returns the values of a piece; called for one piece at a time.
        tokenizer: written into the file; None without one.
        chat_template: Jinja; None for the tokenizer's own.
        name: shown by servers.

    Raises:
        ValueError: llama.cpp could not serve the model.
    """
    kind = _ALIASES.get(dtype, dtype).lower()
    # Looked for before the work, so that a missing tool is reported at once.
    tool = None if kind in _TYPES else quantize_tool(kind)
    settings = {**gguf_settings.architecture_settings(model), "general.type": "model", "general.name": name}
    template, chat = _chat(tokenizer, chat_template)
    if tokenizer is not None:
        settings |= gguf_tokenizer.tokenizer_settings(tokenizer, model.vocab_size, template)
    if tool is None:
        _write_file(directory / MODEL_FILE, model, kind, matrix, settings)
    else:
        # llama.cpp's tool converts files, so a bf16 file is written first.
        unquantized = directory / f".{MODEL_FILE}.bf16"
        _write_file(unquantized, model, "bf16", matrix, settings)
        if together.is_first():
            _quantize(tool, unquantized, directory / MODEL_FILE, kind)
            unquantized.unlink()
    if not together.is_first():
        return
    for warning in gguf_settings.warnings(model):
        log.warning(warning)
    (directory / "Modelfile").write_text(ollama.modelfile(MODEL_FILE, chat), encoding="utf-8")


def _chat(tokenizer: Tokenizer | None, template: str | None) -> tuple[str | None, chat_format.ChatFormat | None]:
    """Return the Jinja template for the file, and its format, if that is known."""
    if isinstance(tokenizer, Mistral):  # its format is defined in mistral-common and not by a template
        chat = chat_format.mistral_format(tokenizer)
        return chat_format.jinja_template(chat), chat
    if tokenizer is not None and template is None:
        template = tokenizer.chat_template
    if not tokenizer or not template:
        return template, None
    return template, chat_format.recognize_format(template, tokenizer)


def _write_file(file: Path, model: config.Model, kind: str, matrix: ReadPiece, settings: container.GgufSettings) -> None:
    """Write one GGUF file, whose matrices have the type that `kind` names in `_TYPES`."""
    encoding, type_code = _TYPES[kind]
    tensors: dict[str, list[names.WeightPiece]] = {}
    for piece in names.weight_pieces(model, names.GGUF):
        tensors.setdefault(piece.name, []).append(piece)
    specs: list[container.GgufSpec] = []
    for name, pieces in tensors.items():
        specs += _specs(name, pieces[0], model, encoding)
    if encoding not in container.UNQUANTIZED_DTYPES:
        container.import_gguf(f"{kind} is quantized")  # fail before the work, not after it

    def values_of(piece: names.WeightPiece, stored: Sequence[container.GgufSpec]) -> Iterator[np.ndarray]:
        """Yield what one matrix of the model becomes in the file: one part of a tensor, or two tensors."""
        dtypes = [container.UNQUANTIZED_DTYPES.get(spec.encoding, np.dtype(np.float32)) for spec in stored]
        if len(stored) == 1:
            yield matrix(piece, dtypes[0])
            return
        assert isinstance(model.attention, config.MultiHeadLatentAttention)  # only kv_b is split
        # One matrix for both. Their dtypes differ only if blocks of a quantized type fit one of them.
        joined = matrix(piece, dtypes[0] if dtypes[0] == dtypes[1] else np.dtype(np.float32))
        for values, dtype in zip(latent_tensors.split_latents(joined, model.attention), dtypes, strict=True):
            yield values.astype(dtype, copy=False)

    def all_parts() -> Iterator[np.ndarray]:
        """Yield the matrices of all tensors, in the order in which the file has them."""
        for name, pieces in tensors.items():
            stored = _specs(name, pieces[0], model, encoding)
            for piece in pieces:
                for part in values_of(piece, stored):
                    # float32 and bfloat16 have a far larger range; the rounding to float16 turns what exceeds it into infinity.
                    if part.dtype == np.float16 and not np.all(np.isfinite(part)):
                        raise ValueError(f"{name} has numbers beyond float16's 65504; use bf16")
                    yield part

    # 2 is the version of llama.cpp's quantized types (GGML_QUANT_VERSION of the package gguf).
    settings = {**settings, "general.file_type": np.uint32(type_code), "general.quantization_version": np.uint32(2)}

    # `parts` is one iterator over all tensors: each tensor takes from where the one before it stopped.
    def write_parts(parts: Iterator[np.ndarray]) -> None:
        """Write the file; each tensor takes as many of the parts as it has pieces."""
        container.write_gguf(file, settings, specs, lambda spec: islice(parts, len(tensors.get(spec.name, (spec,)))))

    together.first_writes(all_parts(), write_parts)


def _specs(name: str, piece: names.WeightPiece, model: config.Model, encoding: str) -> list[container.GgufSpec]:
    """Return the tensors that a tensor of the table is stored as: itself, or the two parts of the joined latents."""
    if not name.endswith(latent_tensors.KV_B):
        return [container.GgufSpec(name, piece.shape, _encoding(piece, encoding))]
    assert isinstance(model.attention, config.MultiHeadLatentAttention)
    parts = latent_tensors.split_shapes(name, model.attention)
    return [container.GgufSpec(n, shape, encoding if container.fits(encoding, shape) else "F16") for n, shape in parts]


def _encoding(piece: names.WeightPiece, encoding: str) -> str:
    """Return how a tensor is stored in a file whose matrices have this encoding."""
    if len(piece.shape) == 1 or ParameterPath.parse(piece.path).is_router:
        return "F32"
    return encoding if container.fits(encoding, piece.shape) else "F16"


# --- llama.cpp's own quantization ---------------------------------------------------------------------------------


def quantize_tool(kind: str) -> str:
    """Return the path of llama.cpp's tool. Raises ValueError if it is missing."""
    if path := shutil.which(QUANTIZE_TOOL):
        return path
    raise ValueError(
        f"dtype {kind} is none of {', '.join(_TYPES)}, and llama.cpp's {QUANTIZE_TOOL}, which makes the others, is not on PATH; "
        "install llama.cpp"
    )


def _quantize(tool: str, file: Path, out: Path, kind: str) -> None:
    """Run llama.cpp's tool. Raises ValueError, with the last line of its output, if it fails."""
    command = [tool, str(file), str(out), kind.upper(), str(os.cpu_count() or 1)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode or not out.is_file():
        output = (result.stderr.strip() or result.stdout.strip()).splitlines() or ["(no output)"]
        raise ValueError(f"{QUANTIZE_TOOL} could not make {kind} (exit code {result.returncode}): {output[-1]}")
