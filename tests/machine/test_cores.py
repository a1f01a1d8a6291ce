"""The number of cores."""

import subprocess
import sys

import pytest

from moe_train.machine.cores import cpu_cores


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit a process to cores")
def test_a_process_that_is_limited_to_a_core() -> None:
    limit = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    program = f"{limit}; from moe_train.machine.cores import cpu_cores; print(cpu_cores())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "1"
    assert cpu_cores() >= 1
