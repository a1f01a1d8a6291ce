"""Deltas of adapter files against those in memory; the faults of whole exports are planted in test_prove_adapter.py."""

from __future__ import annotations

import numpy as np
import pytest

from moe_train.proof.checks import Fault
from moe_train.proof.compare_adapter import DeltaResult, summarize_deltas


def test_a_delta_that_is_off_by_more_than_rounding_is_a_fault() -> None:
    good = [DeltaResult("q", (0,), True, 0.9), DeltaResult("k", (0,), False, 0.0)]
    assert summarize_deltas(good).summary == "2 deltas are those in memory; 1 are zero: never trained"
    for off in (1.1, np.inf, np.nan):
        with pytest.raises(Fault, match=r"the adapter of v\[2\] in the files is not the one in memory \(1 matrices in all\)"):
            summarize_deltas([*good, DeltaResult("v", (2,), True, off)])
