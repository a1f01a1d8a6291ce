"""Instructions and shapes in the text of an HLO module."""

from __future__ import annotations

import pytest

from moe_train.plan import hlo


def test_other_text_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.read("module @jit_step {}")
