"""GGUF models, as llama.cpp and Ollama run them: opened, quantised ones too, and written.

What llama.cpp (v0.5.0) takes, as tried and as its source has it, decides what is written:
- Rotary pairs stand side by side; experts are stacked, one tensor a matrix and layer. Of older files, with a tensor an
  expert, it reads none any more; they are read here.
- Norms and the router are F32 in a file of any type; other matrices are of the file's type, F16 where rows do not divide
  into Q8_0's blocks of 32. Embeddings and head are no exception.
- A tied head is left out. Unknown keys are ignored. For the others see gguf_settings.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moe_train import config
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import new_directory
from moe_train.model.paths import ParameterPath
from moe_train.weights import names, together
from moe_train.weights.gguf import chat_format, container, ollama
from moe_train.weights.gguf import settings as gguf_settings
from moe_train.weights.gguf import tokenizer as gguf_tokenizer
from moe_train.weights.on_disk import Weights

log = logging.getLogger(__name__)

FILE = "model.gguf"
Matrix = Callable[[names.Piece, np.dtype], np.ndarray]
"""A piece of the file's tensors, rounded once to a dtype."""

# Name on the command line -> (type of matrices, llama.cpp's code of such a file)
_TYPES = {"f32": ("F32", 0), "f16": ("F16", 1), "q8_0": ("Q8_0", 7), "bf16": ("BF16", 32)}
_ALIASES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
QUANTIZE = "llama-quantize"

_PER_EXPERT = replace(
    names.GGUF,
    experts=tuple(row._replace(name=row.name.replace("_exps.weight", ".{e}.weight"), stack="") for row in names.GGUF.experts),
)
"""Files from before April 2024."""


# --- reading -----------------------------------------------------------------------------------------------------


def file_in(path: str | Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one in a folder."""
    path = Path(path)
    if path.suffix == ".gguf":
        return path
    found = sorted(path.glob("*.gguf")) if path.is_dir() else []
    return found[0] if len(found) == 1 else None


def open_weights(path: str | Path) -> Weights:
    """A model of one file, or of the only one in a folder.

    Raises FileNotFoundError where there is none, ValueError where it is damaged or of an architecture not built here.
    """
    opened = _open(path)
    model = gguf_settings.read_model(opened)
    layout = _PER_EXPERT if "blk.0.ffn_gate.0.weight" in opened.tensors else names.GGUF
    names.check_counts(path, model, opened.tensors)
    return Weights(opened.file, model, names.pieces(model, layout), opened.tensors)


def read_model(path: str | Path) -> config.Model:
    """The architecture of a GGUF file."""
    return gguf_settings.read_model(_open(path))


def unpack_tokenizer(file: Path) -> Path:
    """The folder, beside the file and made where it is not there, with a Hugging Face tokenizer made of the file's own.

    Its name says what it was made of, so that it never outlives another file's. Raises ValueError for a tokenizer that is
    not read here.
    """
    found = gguf_tokenizer.keys(container.open_file(file).settings)
    folder = file.with_name(f"{file.stem}.tokenizer-{gguf_tokenizer.identity(found)[:8]}")
    if not folder.is_dir():
        try:
            with new_directory(folder) as directory:
                gguf_tokenizer.extract(found, directory, file)
        except FileExistsError:
            log.info("another process has just unpacked %s", folder)
        except PermissionError as error:
            raise ValueError(f"{folder} can not be written for the tokenizer in {file}; name one in data.tokenizer") from error
    return folder


def _open(path: str | Path) -> container.Gguf:
    file = file_in(path)
    if file is None:
        raise FileNotFoundError(f"{path} holds no GGUF file, or several; name one")
    return container.open_file(file)


# --- writing -----------------------------------------------------------------------------------------------------


def write(
    directory: Path,
    model: config.Model,
    dtype: str,
    matrix: Matrix,
    tokenizer: Tokenizer | None = None,
    chat_template: str | None = None,
    name: str = "model",
) -> None:
    """`model.gguf`, and a `Modelfile` for Ollama.

    dtype: f32, f16, bf16, q8_0, or what llama.cpp's own tool makes of bf16 (q4_k_m, q6_k, …) where it is installed.
    chat_template: Jinja, instead of the tokenizer's own. name: shown by servers. One matrix is in memory at a time.
    Where several processes hold the weights, all of them call this, and the first one writes.
    Raises ValueError for what llama.cpp could not serve.
    """
    kind = _ALIASES.get(dtype, dtype).lower()
    tool = None if kind in _TYPES else quantize_tool(kind)
    settings = {**gguf_settings.settings(model), "general.type": "model", "general.name": name}
    template, chat = _chat(tokenizer, chat_template)
    if tokenizer is not None:
        settings |= gguf_tokenizer.settings(tokenizer, model.vocab_size, template)
    if tool is None:
        _write_file(directory / FILE, model, kind, matrix, settings)
    else:
        beside = directory / f".{FILE}.bf16"
        _write_file(beside, model, "bf16", matrix, settings)
        if together.is_first():
            _quantize(tool, beside, directory / FILE, kind)
            beside.unlink()
    if not together.is_first():
        return
    for warning in gguf_settings.warnings(model):
        log.warning(warning)
    (directory / "Modelfile").write_text(ollama.modelfile(FILE, chat), encoding="utf-8")


def _chat(tokenizer: Tokenizer | None, template: str | None) -> tuple[str | None, chat_format.Format | None]:
    """The Jinja template that goes into the file, and the format that it is, where that is known."""
    if isinstance(tokenizer, Mistral):  # its format is in mistral-common, not in a template
        chat = chat_format.of_tokenizer(tokenizer)
        return chat_format.jinja(chat), chat
    if tokenizer is not None and template is None:
        template = tokenizer.chat_template
    return template, chat_format.recognised(template, tokenizer) if tokenizer and template else None


def _write_file(file: Path, model: config.Model, kind: str, matrix: Matrix, settings: Mapping[str, Any]) -> None:
    usual, code = _TYPES[kind]
    tensors: dict[str, list[names.Piece]] = {}
    for piece in names.pieces(model, names.GGUF):
        tensors.setdefault(piece.name, []).append(piece)
    specs = [container.Spec(name, pieces[0].shape, _encoding(pieces[0], usual)) for name, pieces in tensors.items()]
    if usual not in container.PLAIN:
        container.package(f"{kind} is quantised")

    def parts(spec: container.Spec) -> Iterator[np.ndarray]:
        for piece in tensors[spec.name]:
            part = matrix(piece, container.PLAIN.get(spec.encoding, container.PLAIN["F32"]))
            if spec.encoding == "F16" and not np.all(np.isfinite(part)):
                raise ValueError(f"{spec.name} has numbers beyond float16's 65504; use bf16")
            yield part

    settings = {**settings, "general.file_type": np.uint32(code), "general.quantization_version": np.uint32(2)}
    made = (part for spec in specs for part in parts(spec))
    each = {name: len(pieces) for name, pieces in tensors.items()}
    together.first_writes(
        made, lambda made: container.write_file(file, settings, specs, lambda spec: islice(made, each[spec.name]))
    )


def _encoding(piece: names.Piece, usual: str) -> str:
    if len(piece.shape) == 1 or ParameterPath.parse(piece.path).is_router:
        return "F32"
    return usual if container.fits(usual, piece.shape) else "F16"


# --- llama.cpp's own quantisation ---------------------------------------------------------------------------------


def quantize_tool(kind: str) -> str:
    """Path of llama.cpp's tool. Raises ValueError where it is missing."""
    if found := shutil.which(QUANTIZE):
        return found
    raise ValueError(
        f"dtype {kind} is neither {', '.join(_TYPES)} nor can llama.cpp make it here: {QUANTIZE} is not on PATH; install llama.cpp"
    )


def _quantize(tool: str, file: Path, out: Path, kind: str) -> None:
    command = [tool, str(file), str(out), kind.upper(), str(os.cpu_count() or 1)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not out.is_file():
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["nothing"]
        raise ValueError(f"{QUANTIZE} could not make {kind} (exit code {done.returncode}); it said: {said[-1]}")
