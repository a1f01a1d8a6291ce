"""How two sets of logits are compared, router choices first."""

from __future__ import annotations

import numpy as np
import pytest

from moe_train.proof.compare_logits import compare_logits, to_reference
from moe_train.proof.logits import ProbeLogits, Prompts
from tests.proof.exported import MODEL


def test_near_ties_are_counted_and_what_follows_them_is_left_out() -> None:
    T = 6
    prompts = Prompts(np.zeros((1, T), int), np.arange(T)[None])
    routers = np.tile(np.array([4.0, 3.0, 1.0, 0.0]), (2, 1, T, 1))
    logits = np.random.default_rng(0).normal(size=(1, T, 8)).astype(np.float32)
    reference = to_reference(ProbeLogits(logits, routers), MODEL)
    assert compare_logits(ProbeLogits(logits, routers), reference, prompts, MODEL, 1e-3).wrong == 0

    tie = routers.copy()
    tie[0, 0, 3] = [4.0, 3.0 - 1e-5, 3.0, 0.0]  # experts 0 and 2
    tie[1, 0, 4] = [0.0, 1.0, 2.0, 3.0]  # comes after it: whatever it chose is not compared
    shifted = logits.copy()
    shifted[0, 3:] += 100
    found = compare_logits(ProbeLogits(shifted, tie), reference, prompts, MODEL, 1e-3)
    assert (found.near_ties, found.wrong, found.positions, found.excluded) == (1, 0, 3, 3)
    assert found.logits == 0 and found.choices == T + 3

    other = routers.copy()
    other[1, 0, 2] = [4.0, 1.0, 3.0, 0.0]
    assert compare_logits(ProbeLogits(logits, other), reference, prompts, MODEL, 1e-3).first_wrong == (1, 0, 2)


def test_a_reference_of_another_model_is_refused() -> None:
    prompts = Prompts(np.zeros((1, 3), int), np.arange(3)[None])
    logits = ProbeLogits(np.ones((1, 3, 8), np.float32), np.ones((2, 1, 3, 4)))
    reference = to_reference(logits, MODEL)
    for experts in (None, reference.experts_LPTA[:1]):  # type: ignore[index]
        with pytest.raises(ValueError, match="not of a model with these layers and experts; export again"):
            compare_logits(logits, reference._replace(experts_LPTA=experts), prompts, MODEL, 1e-3)
