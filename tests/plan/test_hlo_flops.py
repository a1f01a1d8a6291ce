"""FLOPs of the products of an HLO module."""

from __future__ import annotations

import numpy as np
import pytest

from moe_train.plan import hlo
from tests.plan.hlo_module import entry


@pytest.mark.parametrize("taps", ["same", "valid", "full"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_counts_the_taps_that_meet_its_operand(taps: str, stride: int) -> None:
    """Against numpy: of ones, the sum of the result is the number of pairs that meet."""
    pad = {"same": (1, 1), "valid": (0, 0), "full": (2, 2)}[taps]
    signal = np.pad(np.ones(7), pad)
    met = sum(np.convolve(signal, np.ones(3), "valid")[::stride])
    outputs = (7 + sum(pad) - 3) // stride + 1
    window = f"window={{size=3 stride={stride} pad={pad[0]}_{pad[1]}}}, dim_labels=0bf_0io->0bf"
    line = f"%c = f32[{outputs},4,5]{{2,1,0}} convolution(%x, %k), {window}"
    text = entry("%x = f32[7,4,6]{2,1,0} parameter(0)", "%k = f32[3,6,5]{2,1,0} parameter(1)", line)
    assert hlo.count_program(text).flops == 2 * 4 * 5 * 6 * met


def test_calls_of_cublas_count_as_the_products_that_they_are() -> None:
    call = '%g = f32[4,6] custom-call(f32[4,5] %a, f32[5,6] %b), custom_call_target="__cublas$gemm", '
    assert hlo.count_program(entry(call + 'backend_config={"lhs_contracting_dimensions":["1"]}')).flops == 2 * 4 * 6 * 5
    assert hlo.count_program(entry(call + "backend_config={}")).flops == 0
