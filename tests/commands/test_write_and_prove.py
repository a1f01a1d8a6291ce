"""A model's directory is written whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.commands import write_and_prove
from tests.commands.runs import LORA, MODEL

INTERRUPTED = """
import os, resource, signal, sys
from pathlib import Path
import jax
from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import parameters
from moe_train.model.transformer import init_model
from moe_train.weights import strided
model = config.Model(
    **dict(family="mixtral", vocab_size=64, model_dim=32, num_layers=2, max_seq_len=64),
    attention=config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8),
    ffn=config.MoeFfn(name="moe", ffn_dim=48, num_experts=4, experts_per_token=2),
)
if sys.argv[2] == "kill":
    parts, calls = strided.contiguous_parts, []
    def counted(x):
        calls.append(0)
        if len(calls) == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return parts(x)
    strided.contiguous_parts = counted
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))
with jax.set_mesh(make_mesh(config.Mesh())):
    weights = parameters(init_model(0, model, config.Compute()))[1]
    options = write_and_prove.WriteOptions(dtype="bfloat16", max_shard_bytes=20_000)
    write_and_prove.export_model(weights, model, Path(sys.argv[1]), options)
"""


@pytest.mark.parametrize("how", ["kill", "no room"])
def test_an_export_that_is_killed_or_cannot_write_leaves_nothing_that_looks_finished(how: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "out"), how]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == (-9 if how == "kill" else 1), done.stderr
    left = list(tmp_path.iterdir())
    assert len(left) == (1 if how == "kill" else 0)
    for path in left:
        assert path.name.startswith(".out.unfinished-") and not (path / "export_proof.json").exists()
        assert any(path.glob("*.safetensors"))
    if how == "no room":
        assert "File too large" in done.stderr


@pytest.mark.parametrize(
    ("parameters", "merge", "message"),
    [
        ({"head.lora_a": np.zeros(2)}, False, r"the model has adapters \(1 arrays\); merge them \(--merge\), or export them alone"),
        ({"head.weight": np.zeros(2)}, True, "the model has no adapters to merge; leave --merge out"),
    ],
)
def test_adapters_are_merged_only_where_that_is_asked(
    parameters: dict[str, np.ndarray], merge: bool, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_and_prove.export_model(
            parameters, MODEL, tmp_path / "out", write_and_prove.WriteOptions(dtype="float32", lora=LORA, merge=merge)
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["hf", "mistral"])
def test_few_bits_are_only_written_as_gguf(layout: Any) -> None:
    write_and_prove.check_dtype("gguf", "q8_0")
    write_and_prove.check_dtype(layout, "bfloat16")
    with pytest.raises(ValueError, match=f"--format {layout} does not support dtype q8_0; use float32, bfloat16, float16, fp8"):
        write_and_prove.check_dtype(layout, "q8_0")
