"""Backends that are asked for and cannot start, in processes of their own, since JAX starts its backends once."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from moe_train.machine.backend import GPU_MEMORY, backend_failure, use_gpu_memory

ASK = """
import jax
from moe_train.machine.backend import GPU_MEMORY, backend_failure, use_gpu_memory
try:
    jax.devices()
except Exception as error:
    print(backend_failure(error))
"""


@pytest.mark.parametrize(
    ("platforms", "remedy"),
    [("cuda", "install it with `bash launch/install.sh cuda`, or unset JAX_PLATFORMS"), ("none_such", "; unset JAX_PLATFORMS")],
)
def test_one_line_with_a_remedy(platforms: str, remedy: str) -> None:
    if platforms == "cuda" and importlib.util.find_spec("jax_cuda12_plugin"):
        pytest.skip("this machine has the plugin")
    environment = {**os.environ, "JAX_PLATFORMS": platforms}
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"JAX cannot start the backend of JAX_PLATFORMS={platforms}: ") and remedy in line


def test_other_errors_are_not_explained() -> None:
    try:
        raise RuntimeError("something else")
    except RuntimeError as error:
        assert backend_failure(error) is None


def test_the_share_of_a_gpus_memory_that_the_environment_states_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GPU_MEMORY, raising=False)
    use_gpu_memory()
    assert os.environ[GPU_MEMORY] == "0.9"
    monkeypatch.setenv(GPU_MEMORY, "0.5")
    use_gpu_memory()
    assert os.environ[GPU_MEMORY] == "0.5"
