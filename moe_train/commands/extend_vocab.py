"""Give a model a larger tokenizer: each old token keeps its row of embeddings and head, even if its id changes.

The rows of new tokens are the mean of the old rows, in embeddings and head alike. A new token is then about as likely as an
average one, so the distribution over the old tokens hardly changes, whereas random rows can take most of the probability
(J. Hewitt, Initializing New Word Embeddings for Pretrained Language Models, 2021). The equal rows diverge in training, since
each has its own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal, assert_never

import numpy as np
import tokenizers

from moe_train import config
from moe_train.checkpoint import model_dir, runs
from moe_train.commands import left_out
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.load import load_tokenizer
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.data.tokenizers.tokenizer import Tokenizer, check_vocab
from moe_train.machine.files import JsonObject, check_space, new_directory, refuse_existing
from moe_train.weights import external, hf, mistral, names
from moe_train.weights.on_disk import WeightFiles, array_bytes
from moe_train.weights.texts import Texts, write_texts

WrittenLayout = Literal["hf", "mistral"]
_VOCAB_TABLES = ("embed.weight", names.HUGGING_FACE.head.path)
"""Parameters whose first dim is the vocabulary."""
ROWS_PER_READ = 2**12
"""Rows of embeddings that are read at a time."""
ReadTensor = Callable[[tuple[int | slice, ...]], np.ndarray]
"""Reads a part of a tensor in a file, given by an index."""


def extend_vocab(base: str | Path, out_dir: str | Path, tokenizer: str, layout: WrittenLayout = "hf") -> JsonObject:
    """Write the model at `base` with the vocabulary of `tokenizer`.

    Weights are streamed with one matrix in memory. `out_dir` appears complete, after it was read back and compared, or not at all.

    Args:
        base: an external model.
        out_dir: the folder to write; it must be empty or not exist yet.
        tokenizer: a version of Mistral's (v3), a file, or a folder.
        layout: layout of the files to write.

    Returns:
        The numbers of tokens before and after, of ids that changed, and of parameters, and the dtype.

    Raises:
        ValueError: tokens of the base would be lost, or no token is new.
        FileNotFoundError: base or tokenizer do not exist.
        FileExistsError: `out_dir` exists and is not an empty folder.
        OSError: the disk is full.
    """
    refuse_existing(Path(out_dir))
    if runs.is_run(base):
        raise ValueError(f"BASE {base} is a run; export it first, and extend the export")
    old = load_tokenizer(model_dir.find_tokenizer_config(base))
    new = load_any_tokenizer(tokenizer)
    weights = external.open_external_weights(base)
    left_out.report_left_out(base, "extend-vocab writes the text model alone, whose ids of images may have moved")
    names.check_file_tensors(base, weights.pieces, {name: tensor.shape for name, tensor in weights.tensors.items()}, {})
    # Before anything is written, so that a tokenizer that would lose tokens leaves no files.
    ids = new_ids(old, new)
    check_vocab(old, weights.model.vocab_size)
    model = weights.model.model_copy(update={"vocab_size": new.vocab_size})
    dtype = weights.dtype or "float32"
    source = {(piece.path, piece.lead): piece for piece in weights.pieces}

    def matrix(piece: names.WeightPiece) -> np.ndarray:
        base_piece = source[piece.path, piece.lead]
        read = weights.tensors[base_piece.name].read
        if piece.path in _VOCAB_TABLES:
            table = extend_table(base_piece, read, ids, new.vocab_size)
            return piece.to_file(table).astype(dtype, copy=False)
        return piece.to_file(base_piece.from_file(read)).astype(dtype, copy=False)

    check_space(out_dir, sum(array_bytes(piece.internal_shape, np.dtype(dtype)) for piece in names.weight_pieces(model)))
    with new_directory(out_dir) as directory:
        match layout:
            case "hf":
                hf.write(directory, model, dtype, matrix, new)
            case "mistral":
                mistral.write(directory, model, dtype, matrix, new)
            case _:
                assert_never(layout)
        write_texts(directory, Texts(new))
        _check_written(directory, model, weights, ids)
    return {
        "tokens_before": len(ids),
        "tokens": new.vocab_size,
        "ids_moved": sum(old_id != new_id for old_id, new_id in ids.items()),
        "parameters": sum(int(np.prod(piece.internal_shape)) for piece in names.weight_pieces(model)),
        "dtype": dtype,
    }


def load_any_tokenizer(name: str) -> Tokenizer:
    """Load the tokenizer at a path, or mistral-common's own sentencepiece model of a version such as `v3`."""
    path = Path(name)
    if not path.exists():
        from mistral_common.tokens.tokenizers.base import TokenizerVersion

        versions = [version.value for version in TokenizerVersion]
        if name not in versions:
            raise FileNotFoundError(
                f"{name}: no such file or directory, and not a version of Mistral's tokenizer ({', '.join(versions)})"
            )
        data_dir = resources.files("mistral_common").joinpath("data")
        files = [file for file in data_dir.iterdir() if file.name.endswith(f".model.{name}")]
        if not files:
            raise FileNotFoundError(f"mistral-common contains no sentencepiece model of version {name}; state the path of its file")
        path = Path(str(files[0]))
    if path.is_dir():
        return load_tokenizer(model_dir.find_tokenizer_config(path))
    if path.name == "tokenizer.json":
        return load_tokenizer(config.HuggingFaceTokenizer(name="huggingface", path=str(path)))
    return load_tokenizer(config.MistralTokenizer(name="mistral", path=str(path)))


def new_ids(old: Tokenizer, new: Tokenizer) -> dict[int, int]:
    """Map each old id to the id that the new tokenizer gives to the same piece.

    Raises:
        ValueError: the new tokenizer lacks pieces of the old one, or has no others.
    """
    old_pieces = token_pieces(old)
    new_pieces = {piece: number for number, piece in token_pieces(new).items()}
    missing = [piece for piece in old_pieces.values() if piece not in new_pieces]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(old_pieces)} tokens of {old.files[0]} are not in {new.files[0]}, "
            f"the first {missing[0]!r}; use a tokenizer that contains all of them"
        )
    if len(new_pieces) == len(old_pieces):
        raise ValueError(f"{new.files[0]} has the same {len(old_pieces)} tokens as {old.files[0]}; use a larger tokenizer")
    return {number: new_pieces[piece] for number, piece in old_pieces.items()}


def token_pieces(tokenizer: Tokenizer) -> dict[int, str | bytes]:
    """Map each id to its text, or to its bytes for a tokenizer of bytes (whose control tokens are text)."""
    if isinstance(tokenizer, HuggingFace):
        vocab = tokenizers.Tokenizer.from_file(str(tokenizer.files[0])).get_vocab(with_added_tokens=True)
        return {number: piece for piece, number in vocab.items()}
    assert isinstance(tokenizer, Mistral)
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    mistral_tokenizer = MistralTokenizer.from_file(tokenizer.files[0]).instruct_tokenizer.tokenizer
    pieces: dict[int, str | bytes] = dict(enumerate(mistral_tokenizer.vocab()))
    if isinstance(mistral_tokenizer, Tekkenizer):
        for i in range(mistral_tokenizer.num_special_tokens, mistral_tokenizer.n_words):
            # `vocab` gives one and the same text for all pieces that are no valid UTF-8, so bytes tell them apart.
            pieces[i] = mistral_tokenizer.id_to_byte_piece(i)
    return pieces


def extend_table(piece: names.WeightPiece, read: ReadTensor, ids: Mapping[int, int], size: int) -> np.ndarray:
    """Extend a table to the new vocabulary.

    Args:
        piece: the table, (V, D).
        read: reads parts of the file's tensor.
        ids: old id -> new id.
        size: rows of the new table.

    Returns:
        (size, D): row i of the old table at ids[i], and the mean of these rows everywhere else.
    """
    dim = piece.internal_shape[1]
    total = np.zeros(dim)
    is_new = np.ones(size, bool)
    out = None
    # Only ids of the old tokenizer: rows that pad the base's table belong to no token.
    for old_ids, rows in _rows(piece, read, list(ids)):
        out = np.empty((size, dim), rows.dtype) if out is None else out
        new_rows = [ids[i] for i in old_ids]
        out[new_rows] = rows
        # In float64, since a sum over a whole vocabulary would lose the mean in 16 bits.
        total += rows.sum(0, dtype=np.float64)
        # Rows that stay marked belong to new tokens.
        is_new[new_rows] = False
    assert out is not None
    out[is_new] = (total / len(ids)).astype(out.dtype)
    return out


def _rows(piece: names.WeightPiece, read: ReadTensor, ids: Sequence[int]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield (some of the ids, their rows) until all were read, so that a table of embeddings is never in memory as a whole."""
    for start in range(0, piece.internal_shape[0], ROWS_PER_READ):
        stop = min(start + ROWS_PER_READ, piece.internal_shape[0])
        chunk = [i for i in ids if start <= i < stop]
        if chunk:
            yield chunk, piece.from_file(read, [(start, stop), (0, piece.internal_shape[1])])[np.array(chunk) - start]


def _check_written(directory: Path, model: config.Model, weights: WeightFiles, ids: Mapping[int, int]) -> None:
    """Read the files back and compare the old tokens' rows and all other tensors with the base. Raises RuntimeError."""
    written = external.open_external_weights(directory)
    source = {(piece.path, piece.lead): piece for piece in weights.pieces}
    names.check_file_tensors(directory, written.pieces, {name: tensor.shape for name, tensor in written.tensors.items()}, {})
    if written.model.vocab_size != model.vocab_size:
        raise RuntimeError(
            f"{directory} was written with {written.model.vocab_size} tokens instead of {model.vocab_size}; report this as a bug"
        )
    for piece in written.pieces:
        base_piece = source[piece.path, piece.lead]
        read = weights.tensors[base_piece.name].read
        written_matrix = piece.from_file(written.tensors[piece.name].read)
        if piece.path in _VOCAB_TABLES:
            is_equal = True
            for old_ids, base_rows in _rows(base_piece, read, list(ids)):
                written_rows = written_matrix[[ids[i] for i in old_ids]]
                is_equal = is_equal and np.array_equal(base_rows, written_rows)
        else:
            is_equal = np.array_equal(base_piece.from_file(read), written_matrix)
        # 16-bit tensors may have been written as float32, which changes no value.
        if not is_equal:
            raise RuntimeError(f"{piece.name} in {directory} differs from the base's; report this as a bug")
