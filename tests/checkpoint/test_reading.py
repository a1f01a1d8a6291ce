"""Processes agree on whether the arrays of a checkpoint can be read; long errors of reading are cut."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.checkpoint.reading import short_reason

# of the threads of Orbax that a failure cuts short
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize("fault", ["none", "blind", "data", "metadata"])
def test_two_processes_agree_on_what_is_damaged(tmp_path, fault):
    """One cannot read what the other can: both take the checkpoint before, and neither waits for the other."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "SLURM_", "TPU_"))}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    processes = []
    for index in range(2):
        command = [sys.executable, "-m", "tests.checkpoint.two_processes", str(tmp_path), str(index), fault]
        root = Path(__file__).parents[2]
        mine = env | {"JAX_PROCESS_ID": str(index), "PYTHONPATH": str(root)}
        processes.append(subprocess.Popen(command, cwd=root, env=mine, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=300)[1] for process in processes]
    expected = "row 2, damaged [], [1, 2]" if fault == "none" else "row 1, damaged [2], [1]"
    for index, lines in enumerate(said):
        assert f"process {index}: {expected}" in lines, lines


def test_long_errors_keep_the_reason_of_the_operating_system():
    assert short_reason(ValueError("a\nb  c")) == "a b c" and short_reason(ValueError()) == "ValueError"
    cut = short_reason(OSError("x" * 300 + " No space left on device"))
    assert cut == "x" * 200 + " … No space left on device"
