"""Numbers of files, and how far rounding may have taken them from the exact ones."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from moe_train.proof import reread
from moe_train.proof.rounding import QUANTIZATION_BOUNDS, decode_with_tolerance


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_unit_in_the_last_place_is_allowed(kind: str) -> None:
    exact = np.array([[1.0, 3.0, -0.75]])
    dtype = reread.FLOAT_DTYPES[kind]
    written, allowed = decode_with_tolerance(kind, bytearray(exact.astype(dtype).tobytes()), exact)
    assert np.array_equal(written, exact)
    assert np.array_equal(allowed, np.array([[1, 2, 0.5]]) * float(ml_dtypes.finfo(dtype).eps))


def test_half_a_step_of_a_block_is_allowed() -> None:
    exact = np.linspace(-1, 1, 32)[None]
    block = np.array([(1 / 127, np.round(exact[0] * 127))], reread.Q8_0)
    written, allowed = decode_with_tolerance("Q8_0", bytearray(block.tobytes()), exact)
    assert np.all(np.abs(written - exact) <= allowed) and 0.5 / 127 < allowed.max() < 0.6 / 127


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1"])
def test_quantized_numbers_are_within_their_bound(kind: str) -> None:
    import gguf

    exact = np.random.default_rng(0).normal(size=(3, 64))
    raw = gguf.quantize(exact.astype(np.float32), gguf.GGMLQuantizationType[kind])
    written, allowed = decode_with_tolerance(kind, bytearray(raw.tobytes()), exact)
    assert np.all(np.abs(written - exact) <= allowed)
    assert allowed.max() < 1.1 * QUANTIZATION_BOUNDS[kind].share * np.abs(exact).max()
