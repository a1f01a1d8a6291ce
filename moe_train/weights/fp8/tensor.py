"""An FP8 tensor of a file together with its scales: reading a part of it returns dequantized values.

A number is float32(quantized value) · float32(scale), rounded once, bit for bit as in transformers (`Fp8Dequantize`).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from moe_train.weights.on_disk import StoredTensor

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
"""Dtype of quantized values: 4 bits of exponent, 3 of mantissa, no infinities, and a single NaN (0x7F and 0xFF)."""
_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
"""The number that each byte stands for."""
CHUNK_NUMBERS = 2**18
"""Numbers that are dequantized at once, so that float32 values never take the memory of a whole matrix."""


@dataclass(frozen=True)
class ScaleGrid:
    """How the scales of a tensor lie over its numbers."""

    shape: tuple[int, ...]
    """Number of scales along each dim of the tensor."""
    steps: tuple[int, ...]
    """Numbers that share a scale along each dim; the last ones may be fewer."""


@dataclass(frozen=True)
class Fp8Tensor:
    """A quantized tensor in a file with its scales; none of it is in memory."""

    codes: StoredTensor
    """The quantized values."""
    scales: StoredTensor
    """Their scales."""
    grid: ScaleGrid
    dtype: np.dtype
    """Dtype to which dequantized values are rounded."""

    @property
    def name(self) -> str:
        """Name in the file."""
        return self.codes.name

    @property
    def file(self) -> object:
        """The file of the quantized values, for messages."""
        return self.codes.file

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.codes.shape

    def read(self, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Read and dequantize the part at `index`: integers and step-1 slices of leading dims; () is the whole tensor.

        Only the scales of that part are read.

        Raises:
            ValueError: a quantized value is NaN, or a scale is not a positive number.
        """
        ranges = self._ranges(index)
        out = np.empty([len(cut) for cut in ranges], self.dtype)
        for place, cuts in _chunks(ranges):
            values = _VALUES[self.read_codes(cuts).view(np.uint8)]
            values *= self.read_scales(cuts)
            out[place] = values
        return out.reshape(self._kept_dims(index, out.shape))

    def has_scales_of(self, block_size: int) -> bool:
        """Return whether any `block_size` inputs of an output, counted from the first, share a scale."""
        inputs = self.shape[-1]
        step = self.grid.steps[-1]
        return step >= inputs or step % block_size == 0

    def read_code_of_each(self, index: tuple[int | slice, ...]) -> np.ndarray:
        """Read the quantized values of the part at `index`."""
        codes = self.read_codes(tuple(self._ranges(index)))
        return codes.reshape(self._kept_dims(index, codes.shape))

    def read_scale_of_each(self, index: tuple[int | slice, ...]) -> np.ndarray:
        """Read the scale of each number in the part at `index`, in float32."""
        ranges = self._ranges(index)
        shape = tuple(len(cut) for cut in ranges)
        scales = np.broadcast_to(self.read_scales(tuple(ranges)), shape)
        return scales.reshape(self._kept_dims(index, shape))

    def read_codes(self, cuts: tuple[range, ...]) -> np.ndarray:
        """Read the quantized values in a range of each dim. Raises ValueError if one is NaN."""
        codes = self.codes.read(tuple(slice(cut.start, cut.stop) for cut in cuts))
        # 0x7F and 0xFF are the only NaNs of this format.
        is_nan = (codes.view(np.uint8) & 0x7F) == 0x7F
        if is_nan.any():
            first = tuple(int(i) + cut.start for i, cut in zip(np.argwhere(is_nan)[0], cuts, strict=True))
            raise ValueError(
                f"{self.codes.file}: {self.name}{list(first)} is NaN (byte 0x7F or 0xFF of e4m3); the file is damaged or was "
                "quantized wrongly; download or quantize it again"
            )
        return codes

    def read_scales(self, cuts: tuple[range, ...]) -> np.ndarray:
        """Read the scale of each number in a range of each dim, as float32 of a shape that broadcasts over the range.

        Raises:
            ValueError: a scale is not a positive number.
        """
        scale_cuts = [range(cut.start // step, -(-cut.stop // step)) for cut, step in zip(cuts, self.grid.steps, strict=True)]
        if self.scales.shape == self.grid.shape:
            stored = self.scales.read(tuple(slice(cut.start, cut.stop) for cut in scale_cuts))
        else:  # a spelling without some dims of size 1, which has few scales
            every_scale = self.scales.read().reshape(self.grid.shape)
            stored = every_scale[tuple(slice(cut.start, cut.stop) for cut in scale_cuts)]
        scales = stored.astype(np.float32)
        self._check_scales(scales, scale_cuts)
        for dim, (cut, scale_cut, step) in enumerate(zip(cuts, scale_cuts, self.grid.steps, strict=True)):
            if len(scale_cut) > 1:
                blocks = np.arange(cut.start, cut.stop) // step - scale_cut.start
                scales = np.take(scales, blocks, axis=dim)
        return scales

    def _check_scales(self, scales: np.ndarray, cuts: list[range]) -> None:
        """Raise ValueError if a scale is zero, negative, infinite or NaN."""
        is_wrong = ~(np.isfinite(scales) & (scales > 0))
        if is_wrong.any():
            first = tuple(int(i) for i in np.argwhere(is_wrong)[0])
            place = [i + cut.start for i, cut in zip(first, cuts, strict=True)]
            raise ValueError(
                f"{self.scales.file}: {self.scales.name}{place} is {scales[first]:g}, but a scale has to be a positive number; the "
                "file is damaged or was quantized wrongly; download or quantize it again"
            )

    def _ranges(self, index: tuple[int | slice, ...]) -> list[range]:
        """Return the range of each dim that an index selects; an integer selects a range of one."""
        ranges: list[range] = []
        for d, size in enumerate(self.shape):
            entry = index[d] if d < len(index) else slice(None)
            ranges.append(range(entry, entry + 1) if isinstance(entry, int) else range(*entry.indices(size)))
        return ranges

    @staticmethod
    def _kept_dims(index: tuple[int | slice, ...], shape: tuple[int, ...]) -> list[int]:
        """Return the shape without the dims that an integer selects."""
        return [size for d, size in enumerate(shape) if d >= len(index) or not isinstance(index[d], int)]


def _chunks(ranges: list[range]) -> list[tuple[tuple[slice, ...], tuple[range, ...]]]:
    """Divide a part of a tensor into parts of about `CHUNK_NUMBERS`: (place in the part, range of each dim of the tensor)."""
    *lead, rows, columns = ranges
    step = max(1, CHUNK_NUMBERS // max(1, len(columns)))
    row_starts = range(0, len(rows), step) if math.prod(len(cut) for cut in ranges) else ()
    chunks = []
    for *entries, start in itertools.product(*(range(len(cut)) for cut in lead), row_starts):
        place = (*(slice(i, i + 1) for i in entries), slice(start, start + step))
        single = (cut[i : i + 1] for i, cut in zip(entries, lead, strict=True))
        chunks.append((place, (*single, rows[start : start + step], columns)))
    return chunks
