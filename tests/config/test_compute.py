"""Number formats and mesh axes, by values just beyond their limits."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.tiny import refusal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compute.dtype": "float16"}, "'float32' or 'bfloat16'"),
        ({"mesh.data": -1, "mesh.fsdp": -1}, "only one mesh axis can be -1"),
        ({"mesh.data": 0}, "mesh.data is 0"),
    ],
)
def test_a_value_beyond_its_limit_is_refused(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(**changes)
