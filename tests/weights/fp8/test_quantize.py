"""Scales and codes of quantized matrices by a plain reference, in chunks, and the experts of a fused tensor."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.weights.fp8 import quantize
from tests.weights.fp8.files import E4M3


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_codes_and_scales_are_those_of_a_plain_reference(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    block = data.draw(st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4)))
    w = np.random.default_rng(data.draw(st.integers(0, 9))).normal(0, 10.0 ** data.draw(st.integers(-9, 3)), shape)
    w_OI = w.astype(np.float32) * np.float32(data.draw(st.sampled_from([0, 1])))
    codes, scales = quantize.quantize_matrix("w", w_OI.T.copy().T if data.draw(st.booleans()) else w_OI, block)
    rows, columns = block or shape
    for i, j in np.ndindex(*scales.shape or (1, 1)):
        part = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        scale = scales[i, j] if block else scales[()]
        assert scale == (np.abs(w_OI[part]).max() / np.float32(448) or 1)
        np.testing.assert_array_equal(codes[part], np.clip(w_OI[part] / scale, -448, 448).astype(E4M3))


def test_long_matrices_are_quantized_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(0).normal(size=(21, 10)).astype(np.float32)
    for block in (None, (4, 3)):
        monkeypatch.undo()
        whole = quantize.quantize_matrix("w", w, block)
        monkeypatch.setattr(quantize, "CHUNK_NUMBERS", 50)
        for once, chunked in zip(whole, quantize.quantize_matrix("w", w, block), strict=True):
            np.testing.assert_array_equal(once, chunked)


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("block", [None, (2, 2)])
def test_numbers_that_fp8_cannot_express_are_refused(value: float, block: tuple[int, int] | None) -> None:
    w = np.ones((4, 4), np.float32)
    w[1, 2] = value
    with pytest.raises(ValueError, match="w has infinite or NaN numbers"):
        quantize.quantize_matrix("w", w, block)


def test_gate_and_up_of_an_expert_share_a_scale_without_blocks() -> None:
    gate, up = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32) * np.float32([[[1]], [[3]]])
    (codes_gate, codes_up), scales = quantize.quantize_expert("w", [gate, up], None)
    whole, scale = quantize.quantize_matrix("w", np.concatenate([gate, up]), None)
    np.testing.assert_array_equal(np.concatenate([codes_gate, codes_up]), whole)
    np.testing.assert_array_equal(scales, np.full((2, 1), scale))
    codes, scales = quantize.quantize_expert("w", [gate, up], (2, 3))
    whole, grid = quantize.quantize_matrix("w", np.concatenate([gate, up]), (2, 3))
    np.testing.assert_array_equal(np.concatenate(codes), whole)
    np.testing.assert_array_equal(scales, grid)
