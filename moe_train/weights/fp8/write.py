"""Quantize the linear maps of layers to FP8 while a model is written; embeddings, norms, routers and the head stay bfloat16.

A scale is the largest magnitude of its block over 448, the largest number of e4m3, in float32. Nothing is calibrated: servers
quantize activations as they come (`activation_scheme: dynamic`, `qscheme_act: NO_SCALES`). transformers reads Hugging Face's files
with blocks and with one scale per tensor. vLLM's classes of text models read `weight_scale_inv` with blocks of 128 x 128
(vllm/model_executor/layers/quantization/fp8.py), its vision wrapper of Mistral 3 with one scale per tensor (mistral3.py), as in
Mistral's releases. Mistral's own layout has one scale per tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from moe_train.machine.files import JsonObject
from moe_train.model.paths import ParameterPath
from moe_train.weights import strided
from moe_train.weights.fp8.sections import DEFAULT_BLOCK
from moe_train.weights.fp8.tensor import CHUNK_NUMBERS, E4M3
from moe_train.weights.names import WeightPiece
from moe_train.weights.on_disk import FileDtype
from moe_train.weights.safetensors_files import TensorSpec, TensorValues

ReadPiece = Callable[[WeightPiece], np.ndarray]
"""Returns the values of a piece of the file's tensors, in the dtype of `dtype_before_writing`."""
MAX_E4M3 = 448.0
"""Largest number of the format."""
UNQUANTIZED_DTYPE = np.dtype(ml_dtypes.bfloat16)
"""Dtype of all tensors that are not quantized, as in released models."""
_FLOAT32 = np.dtype(np.float32)
_SMALLEST_SCALE = np.float32(2.0**-126)
"""Smallest normal float32: a smaller scale would have fewer bits."""


class Fp8Scheme(NamedTuple):
    """How FP8 weights are written."""

    block: tuple[int, int] | None
    """Outputs and inputs that share a scale; None for one scale per tensor."""
    scale_name: str
    """What takes the place of `weight` in the names of scales."""


MISTRAL_SCHEME = Fp8Scheme(None, "qscale_weight")
"""The scheme of Mistral's own layout."""
MISTRAL_SECTION: JsonObject = {"qformat_weight": "fp8_e4m3", "qscheme_act": "NO_SCALES"}
"""The section `quantization` of params.json for that scheme."""


def is_quantized(piece: WeightPiece) -> bool:
    """Return whether a weight is quantized: the linear maps of layers, routers excepted."""
    path = ParameterPath.parse(piece.path)
    return path.in_layer and path.leaf == "weight" and not path.is_router and len(piece.groups) == 2


def dtype_before_writing(piece: WeightPiece, dtype: FileDtype) -> np.dtype:
    """Return the dtype in which a writer gets the values of a piece: that of the file, or float32 if they are quantized.

    The biases of routers are float32 in every file, as transformers has them.
    """
    if ParameterPath.parse(piece.path).is_router_bias:
        return _FLOAT32
    if dtype != "fp8":
        return np.dtype(dtype)
    return _FLOAT32 if is_quantized(piece) else UNQUANTIZED_DTYPE


def hugging_face_scheme(pieces: Collection[WeightPiece]) -> Fp8Scheme:
    """Return the scheme of Hugging Face's layout: blocks if they divide every matrix, otherwise one scale per tensor.

    Text models inside a vision wrapper have one scale per tensor.
    """
    if _is_in_wrapper(pieces):
        return Fp8Scheme(None, "weight_scale_inv")
    shapes = [piece.part_shape for piece in pieces if is_quantized(piece)]
    divides = all(size % block == 0 for shape in shapes for size, block in zip(shape, DEFAULT_BLOCK, strict=True))
    return Fp8Scheme(DEFAULT_BLOCK if divides else None, "weight_scale_inv")


def _is_in_wrapper(pieces: Collection[WeightPiece]) -> bool:
    """Return whether the names are those of a text model inside a vision wrapper."""
    return any("language_model." in piece.name for piece in pieces)


def hugging_face_section(pieces: Collection[WeightPiece]) -> JsonObject:
    """Return the section `quantization_config` of config.json, as transformers and vLLM read it."""
    scheme = hugging_face_scheme(pieces)
    unquantized = [piece.name.removesuffix(".weight") for piece in pieces if ParameterPath.parse(piece.path).is_router]
    if _is_in_wrapper(pieces):
        unquantized += ["model.vision_tower", "model.multi_modal_projector"]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": None if scheme.block is None else list(scheme.block),
        "modules_to_not_convert": ["lm_head", *unquantized],
    }


class TensorsToWrite(NamedTuple):
    """The tensors of files in their order, and what computes each."""

    specs: list[TensorSpec]
    values: Callable[[TensorSpec], TensorValues]
    """Returns the values of a spec; called for one at a time."""


def tensors_of_dtype(pieces: Sequence[WeightPiece], dtype: FileDtype, matrix: ReadPiece, scheme: Fp8Scheme) -> TensorsToWrite:
    """List the tensors of a model in files of a dtype.

    Args:
        pieces: the weights; those of fused experts share a tensor, and are in the order of the file.
        dtype: dtype of the files.
        matrix: returns the values of a piece.
        scheme: blocks and names of the scales, for FP8.
    """
    if dtype == "fp8":
        return _quantized_tensors(pieces, matrix, scheme)
    by_name: dict[str, list[WeightPiece]] = {}
    for piece in pieces:
        by_name.setdefault(piece.name, []).append(piece)
    specs = [TensorSpec(name, parts[0].shape, dtype_before_writing(parts[0], dtype)) for name, parts in by_name.items()]

    def part_values(piece: WeightPiece) -> np.ndarray:
        """Return the values of a piece. Raises ValueError if rounding to float16 makes them infinite."""
        with np.errstate(over="ignore"):  # reported by the error below
            array = matrix(piece)
        # float32 and bfloat16 have a far larger range.
        if array.dtype == np.float16 and not np.all(np.isfinite(array)):
            raise ValueError(f"{piece.name} has numbers beyond float16's 65504; use --dtype bfloat16 or float32")
        return array

    def values(spec: TensorSpec) -> TensorValues:
        """Return the values of a tensor, or those of its pieces one after the other."""
        parts = by_name[spec.name]
        return part_values(parts[0]) if not parts[0].part else (part_values(piece) for piece in parts)

    return TensorsToWrite(specs, values)


def _quantized_tensors(pieces: Sequence[WeightPiece], matrix: ReadPiece, scheme: Fp8Scheme) -> TensorsToWrite:
    """List the tensors of a model whose linear maps are quantized: each of these is followed by its scales."""
    specs: list[TensorSpec] = []
    by_name: dict[str, WeightPiece] = {}
    scales_of: dict[str, str] = {}
    for piece in pieces:
        if piece.part:  # experts that share a tensor would need scales of their own
            raise ValueError(
                f"--dtype fp8 is not supported for {piece.name} (all experts in one tensor); use --format mistral or another dtype"
            )
        by_name[piece.name] = piece
        if not is_quantized(piece):
            specs.append(TensorSpec(piece.name, piece.shape, dtype_before_writing(piece, "fp8")))
            continue
        scale_name = piece.name.removesuffix("weight") + scheme.scale_name
        scales_of[scale_name] = piece.name
        specs.append(TensorSpec(piece.name, piece.shape, E4M3))
        specs.append(TensorSpec(scale_name, _scale_shape(piece.shape, scheme.block), _FLOAT32))
    # The scales of the last matrix are kept until they are asked for, since both come from one pass over it.
    pending: dict[str, np.ndarray] = {}

    def values(spec: TensorSpec) -> TensorValues:
        """Return the codes or scales of a quantized weight, or the values of another."""
        if spec.name in pending:
            return pending.pop(spec.name)
        piece = by_name[scales_of.get(spec.name, spec.name)]
        if not is_quantized(piece):
            return matrix(piece)
        codes, scales = quantize_matrix(piece.name, matrix(piece), scheme.block)
        if spec.name in scales_of:  # asked for first, by a process that writes another shard in turn
            return scales
        pending.clear()
        pending[piece.name.removesuffix("weight") + scheme.scale_name] = scales
        return codes

    return TensorsToWrite(specs, values)


def _scale_shape(shape: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, ...]:
    """Return the shape of the scales of a matrix."""
    if block is None:
        return ()
    return tuple(math.ceil(size / step) for size, step in zip(shape, block, strict=True))


def quantize_matrix(name: str, w: np.ndarray, block: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a matrix.

    Args:
        name: name of the tensor, for messages.
        w: the matrix in float32, (outputs, inputs).
        block: outputs and inputs that share a scale, the last ones fewer; None for one scale for all.

    Returns:
        The quantized values and their scales.

    Raises:
        ValueError: a number is infinite or NaN.
    """
    codes = np.empty(w.shape, E4M3)
    scales = np.empty(_scale_shape(w.shape, block), np.float32)
    if block is None:
        largest = np.zeros((), np.float32)
        for rows in _row_chunks(w, 1):
            np.maximum(largest, np.abs(w[rows]).max(initial=0), out=largest)
        scales[...] = _scale(name, largest)
        for rows in _row_chunks(w, 1):
            codes[rows] = _codes(strided.contiguous(w[rows]), scales)
        return codes, scales
    for rows in _row_chunks(w, block[0]):
        part = strided.contiguous(w[rows])
        row_starts = np.arange(0, part.shape[0], block[0])
        column_starts = np.arange(0, part.shape[1], block[1])
        largest_of_blocks = np.maximum.reduceat(np.maximum.reduceat(np.abs(part), row_starts, 0), column_starts, 1)
        first = rows.start // block[0]
        part_scales = _scale(name, largest_of_blocks)
        scales[first : first + len(row_starts)] = part_scales
        of_rows = np.arange(part.shape[0]) // block[0]
        of_columns = np.arange(part.shape[1]) // block[1]
        codes[rows] = _codes(part, part_scales[of_rows][:, of_columns])
    return codes, scales


def _row_chunks(w: np.ndarray, multiple: int) -> list[slice]:
    """Divide the rows of a matrix into parts of about `CHUNK_NUMBERS`, each but the last a multiple of `multiple` rows."""
    step = max(1, CHUNK_NUMBERS // max(1, w.shape[1]) // multiple) * multiple
    return [slice(start, min(start + step, len(w))) for start in range(0, len(w), step)]


def _scale(name: str, largest: np.ndarray) -> np.ndarray:
    """Return the scales of blocks with these largest magnitudes; 1 for blocks of zeros."""
    if not np.all(np.isfinite(largest)):
        raise ValueError(f"{name} has infinite or NaN numbers, which FP8 cannot express; look at the run's loss for divergence")
    return np.where(largest > 0, np.maximum(largest / np.float32(MAX_E4M3), _SMALLEST_SCALE), np.float32(1))


def _codes(w: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Round quotients to the nearest number of the format, ties to even."""
    # A quotient can exceed 448 by a rounding of its scale, and would become NaN.
    return np.clip(w / scales, -MAX_E4M3, MAX_E4M3).astype(E4M3)
