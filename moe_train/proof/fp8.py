"""The second reader's own FP8: what the numbers and scales of our exports stand for, and how far rounding may have taken them.

Nothing here comes from `weights.fp8`. e4m3 has a sign, 4 bits of exponent with bias 7 and 3 of mantissa; 0x7F and 0xFF are NaN
(arXiv:2209.05433). A scale is that of a rectangle of 128 outputs and 128 inputs, or of a whole matrix, and multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_train.machine.files import read_object
from moe_train.proof.checks import Fault
from moe_train.proof.reread import FP8, SCALE_BLOCK, Stored, scale_shape

LARGEST = 448.0
"""Largest number of the format."""
SCALE_TOLERANCE = 1e-6
"""Relative difference between a scale and the largest magnitude of its block over 448: roundings to float32."""


def _numbers() -> np.ndarray:
    """Return the number that each byte stands for."""
    code = np.arange(256)
    exponent = code >> 3 & 15
    mantissa = (code & 7) / 8
    magnitude = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    magnitude[(code & 127) == 127] = np.nan
    return np.where(code >> 7 == 1, -magnitude, magnitude)


NUMBERS = _numbers()
"""Number of each byte, in float64."""


def read_scales(stored: Stored) -> np.ndarray:
    """Return the scales of a quantized tensor in float64, in the shape of the file."""
    assert stored.scales is not None, stored
    with stored.scales.file.open("rb") as file:
        raw = stored.scales.read(file.fileno(), 0, stored.scales.rows)
    scales = np.frombuffer(raw, np.float32).astype(np.float64)
    return scales.reshape(stored.scales.shape)


def scales_of_rows(scales: np.ndarray, start: int, stop: int, columns: int) -> np.ndarray:
    """Return the scale of each number in some rows of a matrix."""
    if scales.size == 1:
        return np.broadcast_to(scales, (stop - start, columns))
    of_rows = scales[np.arange(start, stop) // SCALE_BLOCK]
    return of_rows[:, np.arange(columns) // SCALE_BLOCK]


def decode(raw: bytearray, scales: np.ndarray, exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decode some rows.

    Args:
        raw: their bytes.
        scales: the scale of each number.
        exact: the exact numbers, in float64.

    Returns:
        The numbers in float64, and how far each may be from `exact`: half a step of the format at its size.
    """
    written = NUMBERS[np.frombuffer(raw, np.uint8)].reshape(exact.shape) * scales
    # Exponents below -6 have the step of the smallest normal number; the step is 2^-3 of the power of two below the number.
    exponent = np.floor(np.log2(np.maximum(np.abs(exact) / scales, 2.0**-6)))
    # A thousandth more for the rounding of the quotient, of its scale and of a merged weight to float32.
    return written, scales * 2.0 ** (exponent - 4) * 1.001


class BlockMaxima:
    """The largest magnitudes of the blocks of a matrix, collected while its rows are compared, to check the scales with."""

    def __init__(self, scales: np.ndarray) -> None:
        self.scales = scales
        self.largest = np.zeros_like(scales)

    def add(self, exact: np.ndarray, start: int) -> None:
        """Take in the exact numbers of rows that begin at `start`."""
        if self.scales.size == 1:
            self.largest = np.maximum(self.largest, np.abs(exact).max(initial=0))
            return
        by_column_block = np.maximum.reduceat(np.abs(exact), np.arange(0, exact.shape[1], SCALE_BLOCK), axis=1)
        np.maximum.at(self.largest, np.arange(start, start + len(exact)) // SCALE_BLOCK, by_column_block)

    def fault(self) -> str | None:
        """Return what is wrong with the scales after all rows were taken in; None if each is the largest magnitude over 448."""
        needed = np.where(self.largest > 0, np.maximum(self.largest / LARGEST, 2.0**-126), 1.0)
        is_wrong = ~(np.abs(self.scales - needed) <= SCALE_TOLERANCE * needed)
        if not is_wrong.any():
            return None
        place = tuple(int(i) for i in np.argwhere(is_wrong)[0])
        return (
            f"has the scale {self.scales[place]:g} at {list(place)}, but the largest magnitude of its block needs {needed[place]:g}"
        )


class ScalesOfParts:
    """The scales of a quantized tensor, divided among the matrices that it consists of.

    Without blocks, gate and up of an expert have one scale together, which a fused tensor states twice.
    """

    def __init__(self, stored: Stored, num_parts: int) -> None:
        scales = read_scales(stored)
        self._scales = scales.reshape(num_parts, -1, scales.shape[-1] if scales.ndim else 1)
        self._is_stated_twice = scales.ndim == 3 and scales.shape[1:] == (2, 1) and num_parts == 2 * len(scales)
        self._maxima = BlockMaxima(self._scales[0])

    def of_part(self, part: int) -> np.ndarray:
        """Return the scales of a part: (blocks of outputs, blocks of inputs), or one scale (1, 1)."""
        return self._scales[part]

    def maxima_of(self, part: int) -> BlockMaxima:
        """Return what collects the largest magnitudes of a part, in the order of the parts."""
        if not self._is_up_projection(part):
            self._maxima = BlockMaxima(self._scales[part])
        return self._maxima

    def fault(self, part: int) -> str | None:
        """Return what is wrong with the scales of a part whose rows were all taken in; None if nothing is."""
        if not self._is_stated_twice:
            return self._maxima.fault()
        if not self._is_up_projection(part):
            return None  # its scale is that of the larger of two matrices
        gate, up = self._scales[part - 1].item(), self._scales[part].item()
        if gate != up:
            return f"has the scales {gate:g} and {up:g} for gate and up of expert {part // 2}, which have to be equal"
        return self._maxima.fault()

    def _is_up_projection(self, part: int) -> bool:
        return self._is_stated_twice and part % 2 == 1


def check_claim(directory: Path, layout: str, stored: Mapping[str, Stored]) -> None:
    """Raise Fault unless config.json or params.json states the quantization that the tensors have, and none if they have none."""
    if layout == "gguf":
        return
    file = directory / ("config.json" if layout == "hf" else "params.json")
    fields = read_object(file)
    claims: dict[str, Any] = {}
    for level in (fields, fields.get("text_config") or {}):
        claims |= {key: level[key] for key in ("quantization", "quantization_config") if level.get(key)}
    quantized = [tensor for tensor in stored.values() if tensor.kind == FP8]
    if not quantized:
        if claims:
            raise Fault(f"{file.name} claims a quantization ({next(iter(claims))}), but no tensor is quantized")
        return
    in_blocks = layout == "hf" and _are_in_blocks(quantized)
    for tensor in quantized:
        assert tensor.scales is not None, tensor
        if tensor.scales.shape != scale_shape(tensor, in_blocks):
            raise Fault(f"{tensor.name} has scales of the shape {tensor.scales.shape}, not {scale_shape(tensor, in_blocks)}")
    expected: dict[str, Any] = {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "NO_SCALES"}}
    if layout == "hf":
        block = [SCALE_BLOCK, SCALE_BLOCK] if in_blocks else None
        expected = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}}
    for key, section in expected.items():
        stated = claims.get(key) or {}
        for name, value in section.items():
            if name not in stated or stated[name] != value:
                raise Fault(f"{file.name} has to state {key}.{name} {value!r} for its FP8 tensors, not {stated.get(name)!r}")


def _are_in_blocks(quantized: Sequence[Stored]) -> bool:
    """Return whether the tensors have scales in blocks, as far as their shapes tell."""
    return any(tensor.scales is not None and tensor.scales.shape != scale_shape(tensor, in_blocks=False) for tensor in quantized)


def unquantized_modules(directory: Path, layout: str) -> tuple[str, ...]:
    """Return the modules that config.json of an export in blocks leaves out of its quantization.

    With one scale per tensor every linear map of a layer is quantized, whatever the file leaves out.
    """
    if layout != "hf":
        return ()
    section = read_object(directory / "config.json").get("quantization_config") or {}
    if not section.get("weight_block_size"):
        return ()
    return tuple(section.get("modules_to_not_convert") or ())
