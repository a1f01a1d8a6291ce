"""The programs of examples/ run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def printed_by(program: str, *arguments: str, compiled: Path) -> str:
    """Run an example from the root of the repository and return what it prints."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = {**os.environ, **cache, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES / program), *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def losses_in(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", output)]


def test_tiny_moe_learns(compiled: Path) -> None:
    losses = losses_in(printed_by("tiny_moe.py", compiled=compiled))
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("program", ["own_loss.py", pytest.param("own_data.py", marks=pytest.mark.slow)])
def test_a_run_of_ones_own_learns(program: str, compiled: Path, tmp_path: Path) -> None:
    losses = losses_in(printed_by(program, str(tmp_path / "run"), compiled=compiled))
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.3


def test_router_statistics_name_experts_of_each_layer(compiled: Path) -> None:
    assert re.findall(r"layer (\d)", printed_by("router_statistics.py", compiled=compiled)) == ["0", "1"]


@pytest.mark.slow
def test_lora_export_is_proved(compiled: Path, tmp_path: Path) -> None:
    output = printed_by("lora_export.py", str(tmp_path), compiled=compiled)
    assert "FAILED" not in output and "adapter: ok" in output and "merged-hf: ok" in output
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_small_model_learns_to_read_invoices(compiled: Path, tmp_path: Path) -> None:
    output = printed_by("invoices.py", str(tmp_path), compiled=compiled)
    [line] = [line for line in output.splitlines() if line.startswith("invoices read")]
    assert all(float(share) > 0.9 for share in re.findall(r"\d\.\d+", line)), line


@pytest.mark.slow
def test_a_small_model_learns_to_transcribe_digits(compiled: Path, tmp_path: Path) -> None:
    output = printed_by("spoken_digits.py", str(tmp_path), compiled=compiled)
    [line] = [line for line in output.splitlines() if line.startswith("word error rate")]
    rate, clips = re.findall(r"\d[.\d]*", line)
    assert float(rate) < 0.1 and clips == "50", line


def test_the_index_names_each_program() -> None:
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for program in EXAMPLES.glob("*.py"):
        assert f"`{program.name}`" in index
