"""Memory beside a model's own while it is exported, loaded or extended: the largest tensor and 256 MiB, and no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration import streaming

ROOT = Path(__file__).parents[2]


def in_a_process(mode: str, folder: Path) -> dict[str, float]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests/integration/streaming.py"), mode, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_host_memory_is_bounded_by_the_largest_tensor_both_ways(tmp_path: Path) -> None:
    for mode in ("tensors", "files", "load", "fp8", "load_fp8", "extend", "full"):
        found = in_a_process(mode, tmp_path)
        bound = found["largest"] + 256
        assert found["model"] > 1.5 * 1024 and found["model"] > 4 * bound
        # To run the files they are loaded as a second model, of which a layer at a time is taken out and made float32:
        # on devices, whose memory is the host's here.
        on_devices = found["model"] * (1 + 3 / streaming.MODEL.num_layers) if mode == "full" else 0
        assert found["above"] - on_devices < bound, (mode, found)
        print(mode, found)


@pytest.mark.slow
def test_a_checkpoint_is_held_in_few_bits_a_layer_at_a_time(tmp_path: Path) -> None:
    for _ in ("saved", "loaded"):
        found = in_a_process("run", tmp_path)
    assert found["model"] > 2 * found["largest"] and found["above"] < found["largest"] + 256, found
