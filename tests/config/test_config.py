"""The whole config: its name, its seed, and where the model comes from."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.config.tiny import config_with, refusal


def test_a_small_run_is_accepted() -> None:
    config = config_with()
    assert config.compute.dtype == "float32"
    assert config.mesh.fsdp == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../up"}, "should match pattern"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"seed": 2**63}, "less than 9223372036854775808"),
        ({"model": ...}, "state model"),
        ({"compute.attention": "cudnn"}, "compute.attention cudnn does not support float32; set compute.dtype to bfloat16"),
    ],
)
def test_a_value_beyond_its_limit_is_refused(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(**changes)


def test_the_config_is_imported_without_jax() -> None:
    code = "import sys; import moe_train.config.yaml_file; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
