"""How the model's matrices become those of files."""

from __future__ import annotations

import numpy as np

from moe_train.proof import expected_tensor


def test_forms_of_matrices() -> None:
    """Rows of the file are outputs; interleaved, row 1 of a head of 4 is what half a head later was row 2."""
    w = np.arange(2 * 3 * 4).reshape(2, 3, 4)  # (in, heads, head_dim)
    assert np.array_equal(expected_tensor.outputs_last(w)[5], w[:, 1, 1])
    assert np.array_equal(expected_tensor.outputs_one(w)[3], w[..., 3].ravel())
    assert np.array_equal(expected_tensor.interleaved(w)[4:8], w[:, 1, [0, 2, 1, 3]].T)
