"""Turn a dense model into a Mixtral: copy each layer's feed-forward part into E experts (sparse upcycling, arXiv:2212.05055).

As in the paper, all other weights are kept and routers are new: normally distributed, with the standard deviation that the
architecture draws its own weights with. Mixtral's softmax over the k chosen experts makes their weights sum to 1, so k equal
experts compute what the dense layer did. The copies diverge in training, as each sees different tokens. Optional noise makes
them differ from the start; it is normal and scaled by each matrix's own standard deviation.

With a granularity G above 1, each copy is split along its hidden dims into G fine-grained experts (arXiv:2410.07524, section 3:
virtual groups and weight scaling). All experts of a copy share the router weights of one group, so that a token selects whole
copies, and the softmax gives each expert 1 / G of its copy's weight. The down projections are multiplied by G in return.

A shared expert is never made: no file format of grouped-query attention has a place for one (`config.without_format`), and a model
with one is only trained from random weights, with `export: none`.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from moe_train import config
from moe_train.checkpoint import model_dir, runs
from moe_train.commands import left_out
from moe_train.data.tokenizers.load import load_tokenizer
from moe_train.data.tokenizers.tokenizer import check_vocab
from moe_train.machine.files import JsonObject, check_space, new_directory, refuse_existing
from moe_train.model.paths import ParameterPath
from moe_train.weights import external, hf, names, safetensors_files
from moe_train.weights.on_disk import WeightFiles, array_bytes
from moe_train.weights.texts import Texts, write_texts


@dataclass(frozen=True)
class NewExperts:
    """How the experts of each layer are made from its feed-forward part."""

    count: int = 8
    """Experts per layer."""
    per_token: int = 2
    """Experts that each token is routed to."""
    granularity: int = 1
    """Experts that a copy of the feed-forward part is split into."""
    noise: float = 0.0
    """Standard deviation of the noise added to each expert's matrices, relative to that of the matrix."""
    seed: int = 0
    """Seed of routers and noise."""


def upcycle(
    base: str | Path,
    out_dir: str | Path,
    experts: NewExperts = NewExperts(),
    max_shard_bytes: int = safetensors_files.MAX_SHARD_BYTES,
) -> JsonObject:
    """Write a Hugging Face Mixtral made from the dense model at `base`, read it back and compare.

    Weights are streamed with one matrix in memory. `out_dir` appears complete or not at all; tokenizer and generation config are
    the base's.

    Args:
        base: a dense model in any supported layout.
        out_dir: the folder to write; it must be empty or not exist yet.
        experts: number and size of the experts.
        max_shard_bytes: size limit of a file of weights.

    Returns:
        The number of parameters (all, and those that a token passes through), tensors and bytes.

    Raises:
        ValueError: the base is no dense model of a supported family.
        FileExistsError: `out_dir` exists and is not an empty folder.
        OSError: the disk is full.
    """
    refuse_existing(Path(out_dir))
    if runs.is_run(base):
        raise ValueError(f"BASE {base} is a run; export it first, and upcycle the export")
    if not 0 <= experts.noise < float("inf"):
        raise ValueError(f"--noise {experts.noise} is not a standard deviation; use 0 or more")
    dense = external.open_external_weights(base)
    left_out.report_left_out(base, "a Mixtral has no place for them")
    model = mixtral_of(dense.model, experts, base)
    names.check_file_tensors(base, dense.pieces, {n: t.shape for n, t in dense.tensors.items()}, {})
    tokenizer = load_tokenizer(model_dir.find_tokenizer_config(base))
    check_vocab(tokenizer, model.vocab_size)
    texts = Texts(tokenizer)
    dtype = dense.dtype or "float32"
    matrix = _matrix_maker(dense, model, dtype, experts)
    table = names.weight_pieces(model)
    check_space(out_dir, sum(array_bytes(piece.shape, np.dtype(dtype)) for piece in table))
    with new_directory(out_dir) as directory:
        hf.write(directory, model, dtype, matrix, texts.tokenizer, max_shard_bytes)
        write_texts(directory, texts)
        generation_config = Path(base) / "generation_config.json"
        if generation_config.is_file():
            shutil.copyfile(generation_config, directory / generation_config.name)
        _check_written(directory, model, table, matrix)
    in_experts = sum(int(np.prod(piece.shape)) for piece in table if len(piece.lead) == 2)
    # Experts of a layer are equal in size, so the division is exact.
    idle = in_experts * (experts.count - experts.per_token) // experts.count
    total = sum(int(np.prod(piece.shape)) for piece in table)
    return {
        "parameters": total,
        "active_parameters": total - idle,
        "parameters_of_base": sum(int(np.prod(piece.shape)) for piece in dense.pieces),
        "tensors": len(table),
        "bytes": total * np.dtype(dtype).itemsize,
        "dtype": dtype,
    }


def _matrix_maker(
    dense: WeightFiles, model: config.Model, dtype: str, experts: NewExperts
) -> Callable[[names.WeightPiece], np.ndarray]:
    """Return a function that computes a matrix of the Mixtral, as the file holds it, from the dense model."""
    source = {(piece.path, piece.lead): piece for piece in dense.pieces}

    def matrix(piece: names.WeightPiece) -> np.ndarray:
        # Seeded by name, so that a matrix is drawn identically when it is compared after writing.
        rng = np.random.default_rng((experts.seed, zlib.crc32(piece.path.encode()), *piece.lead))
        if ParameterPath.parse(piece.path).is_router:
            return piece.to_file(_router(rng, model, piece.internal_shape, experts.granularity)).astype(dtype)
        # Every expert of a layer comes from that layer's only feed-forward part.
        base_piece = source[piece.path, piece.lead[:1]]
        read = dense.tensors[base_piece.name].read
        is_expert = len(piece.lead) == 2
        if not is_expert:
            return piece.to_file(base_piece.from_file(read)).astype(dtype)
        w = base_piece.from_file(read, _expert_ranges(piece, base_piece, experts.granularity))
        if experts.granularity > 1 and piece.path.endswith("down_proj.weight"):
            # In float32; a power of two is exact in every dtype.
            w = w.astype(np.float32) * experts.granularity
        if experts.noise:
            # Added in float32, and rounded to the dtype of the file once.
            w = w.astype(np.float32)
            w += experts.noise * w.std() * rng.standard_normal(w.shape, np.float32)
        return piece.to_file(w).astype(dtype)

    return matrix


def _router(rng: np.random.Generator, model: config.Model, shape: tuple[int, ...], granularity: int) -> np.ndarray:
    """Draw a router (D, E) in which the experts of a copy have equal columns."""
    D, E = shape
    drawn = model.init_stddev * rng.standard_normal((D, E // granularity), np.float32)
    return np.repeat(drawn, granularity, axis=1)


def _expert_ranges(piece: names.WeightPiece, base_piece: names.WeightPiece, granularity: int) -> list[tuple[int, int]]:
    """Return the ranges of the dense matrix's dims that become this expert: all, but for a share of the hidden dims."""
    shard = piece.lead[1] % granularity
    ranges = []
    for size, full_size in zip(piece.internal_shape, base_piece.internal_shape, strict=True):
        # Only the hidden dim differs between an expert and the dense layer.
        start = shard * size if size < full_size else 0
        ranges.append((start, start + size))
    return ranges


def _check_written(
    directory: Path, model: config.Model, table: Sequence[names.WeightPiece], matrix: Callable[[names.WeightPiece], np.ndarray]
) -> None:
    """Read the files back and compare them with the matrices, computed again. Raises RuntimeError."""
    written = external.open_external_weights(directory)
    if written.model != model:
        raise RuntimeError(f"{directory / 'config.json'} describes a different model than was written: {written.model}")
    for piece in table:
        # Bytes, since NaN differs from itself and -0 equals 0.
        if written.tensors[piece.name].read().tobytes() != matrix(piece).tobytes():
            raise RuntimeError(f"{piece.name} in {directory} is not what was written; write it again, and check the disk")


def mixtral_of(dense: config.Model, experts: NewExperts, base: str | Path) -> config.Model:
    """Return the architecture with experts made from each feed-forward part.

    Args:
        dense: the dense architecture.
        experts: number and size of the experts.
        base: path of the dense model, for messages.

    Raises:
        ValueError: the numbers do not fit together, or a Mixtral cannot express the rest of the architecture.
    """
    if not isinstance(dense.ffn, config.DenseFfn):
        raise ValueError(f"{base} already has {dense.ffn.num_experts} experts; start from a dense model")
    if len(dense.attention.windows) > 1:
        raise ValueError(f"{base} has windows in some layers only, which a Mixtral cannot have; start from another dense model")
    if experts.count < 2 or not 1 <= experts.per_token <= experts.count:
        raise ValueError(
            f"--experts-per-token {experts.per_token} does not fit --experts {experts.count}; "
            "use at least 2 experts, and from 1 to all of them per token"
        )
    F = dense.ffn.ffn_dim
    _check_granularity(experts, F)
    ffn = config.MoeFfn(
        name="moe", ffn_dim=F // experts.granularity, num_experts=experts.count, experts_per_token=experts.per_token
    )
    try:
        return config.Model.model_validate({**dict(dense), "family": "mixtral", "ffn": ffn})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ValueError(f"{base} is a {dense.family} that cannot become a Mixtral: {reason}") from error


def _check_granularity(experts: NewExperts, ffn_dim: int) -> None:
    """Raise ValueError unless copies can be split evenly, and a token selects whole copies.

    Args:
        experts: number and size of the experts.
        ffn_dim: hidden dims of the dense feed-forward part.
    """
    G = experts.granularity
    if G < 1:
        raise ValueError(f"--granularity {G} is not a number of experts; use 1 or more")
    if ffn_dim % G:
        raise ValueError(f"--granularity {G} does not divide the feed-forward width {ffn_dim} of BASE; use a divisor of it")
    for option, number in (("--experts", experts.count), ("--experts-per-token", experts.per_token)):
        if number % G:
            raise ValueError(f"{option} {number} is not a multiple of --granularity {G}: each copy has {G} experts; use a multiple")
    if experts.count == G:
        raise ValueError(f"--experts {experts.count} with --granularity {G} is a single copy; use at least {2 * G} experts")
