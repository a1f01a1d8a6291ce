"""The tensors of a model in safetensors files of any dtype, computed one at a time; FP8 ones are followed by their scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from moe_train.model.paths import ParameterPath
from moe_train.weights import strided
from moe_train.weights.fp8.quantize import quantize_expert, quantize_matrix
from moe_train.weights.fp8.scheme import Fp8Scheme, is_linear_of_layer
from moe_train.weights.fp8.tensor import E4M3
from moe_train.weights.names import WeightPiece
from moe_train.weights.on_disk import FileDtype
from moe_train.weights.safetensors_files import TensorSpec, TensorValues

ReadPiece = Callable[[WeightPiece], np.ndarray]
"""Returns the values of a piece of the file's tensors, in the dtype of `dtype_before_writing`."""
UNQUANTIZED_DTYPE = np.dtype(ml_dtypes.bfloat16)
"""Dtype of all tensors that are not quantized, as in released models."""
_FLOAT32 = np.dtype(np.float32)


def dtype_before_writing(piece: WeightPiece, dtype: FileDtype) -> np.dtype:
    """Return the dtype in which a writer gets the values of a piece: that of the file, or float32 if they may be quantized.

    The biases of routers are float32 in every file, as transformers has them.
    """
    if ParameterPath.parse(piece.path).is_router_bias:
        return _FLOAT32
    if dtype != "fp8":
        return np.dtype(dtype)
    return _FLOAT32 if is_linear_of_layer(piece) else UNQUANTIZED_DTYPE


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
        scheme: which weights are quantized, and their scales, for FP8.
    """
    by_name: dict[str, list[WeightPiece]] = {}
    for piece in pieces:
        by_name.setdefault(piece.name, []).append(piece)
    if dtype == "fp8":
        return _quantized_tensors(by_name, matrix, scheme)
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


def _quantized_tensors(by_name: dict[str, list[WeightPiece]], matrix: ReadPiece, scheme: Fp8Scheme) -> TensorsToWrite:
    """List the tensors of a model whose linear maps are quantized: each of these is followed by its scales."""
    specs: list[TensorSpec] = []
    quantized: dict[str, _QuantizedTensor] = {}
    for name, parts in by_name.items():
        if not scheme.quantizes(parts[0]):
            is_bias = ParameterPath.parse(parts[0].path).is_router_bias
            specs.append(TensorSpec(name, parts[0].shape, _FLOAT32 if is_bias else UNQUANTIZED_DTYPE))
            continue
        scale_name = scheme.scale_name(name)
        quantized[name] = quantized[scale_name] = _QuantizedTensor(name, parts, matrix, scheme.block)
        specs.append(TensorSpec(name, parts[0].shape, E4M3))
        specs.append(TensorSpec(scale_name, scheme.scale_shape(parts[0]), _FLOAT32))
    # The last tensor that was quantized keeps its scales until they are asked for, since both come from one pass over it.
    last: list[_QuantizedTensor] = []

    def values(spec: TensorSpec) -> TensorValues:
        """Return the codes or scales of a quantized weight, or the values of another."""
        if spec.name not in quantized:
            parts = by_name[spec.name]
            arrays = (_of_dtype(matrix(piece), spec.dtype) for piece in parts)
            return arrays if parts[0].part else next(arrays)
        tensor = quantized[spec.name]
        if spec.name != tensor.name:
            return tensor.take_scales().reshape(spec.shape)
        for earlier in last:
            earlier.forget_scales()
        last[:] = [tensor]
        codes = tensor.codes()
        return codes if tensor.is_fused else next(codes)

    return TensorsToWrite(specs, values)


def _of_dtype(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return an array in a dtype, without a copy if it has it."""
    return array if array.dtype == dtype else strided.contiguous(array, dtype)


class _QuantizedTensor:
    """A tensor of FP8 codes with its scales, quantized when either is asked for."""

    def __init__(self, name: str, parts: Sequence[WeightPiece], matrix: ReadPiece, block: tuple[int, int] | None) -> None:
        self.name = name
        self.is_fused = bool(parts[0].part)
        self._matrix = matrix
        self._block = block
        # The pieces of an expert, gate and up, are neighbours.
        self._experts: dict[tuple[int, ...], list[WeightPiece]] = {}
        for piece in parts:
            self._experts.setdefault(piece.lead, []).append(piece)
        self._scales: np.ndarray | None = None

    def codes(self) -> Iterator[np.ndarray]:
        """Yield the quantized values of one piece after the other; the scales are known when the last was yielded."""
        if not self.is_fused:
            ((piece,),) = self._experts.values()
            codes, self._scales = quantize_matrix(self.name, self._matrix(piece), self._block)
            yield codes
            return
        scales: list[np.ndarray] = []
        for pieces in self._experts.values():
            codes_of_pieces, scales_of_expert = quantize_expert(self.name, [self._matrix(piece) for piece in pieces], self._block)
            scales.append(scales_of_expert)
            if len(scales) == len(self._experts):
                self._scales = np.stack(scales)
            yield from codes_of_pieces

    def take_scales(self) -> np.ndarray:
        """Return the scales and forget them, after another pass over the weights if nobody has asked for the codes before."""
        if self._scales is None:  # asked for first, by a process that writes another shard in turn
            for _ in self.codes():
                pass
        assert self._scales is not None
        scales = self._scales
        self._scales = None
        return scales

    def forget_scales(self) -> None:
        """Release the scales if nobody has asked for them."""
        self._scales = None
