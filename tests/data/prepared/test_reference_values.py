"""The outputs of a reference on an example."""

from __future__ import annotations

import numpy as np

from moe_train.data.prepared.reference_values import ReferenceValues


def test_a_dense_model_has_no_experts() -> None:
    assert ReferenceValues(np.zeros(3)).expert_ids is None
