"""From files to arrays: what the host holds meanwhile."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moe_train import config
from moe_train.model.parameters import parameters
from moe_train.model.quantize import unquantized_shapes
from moe_train.model.transformer import abstract_model
from moe_train.weights import external, hf
from tests.tiny import ONE

MODEL = config.Model(
    family="mixtral",
    vocab_size=16,
    model_dim=64,
    num_layers=8,
    attention=config.GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=64),
    ffn=config.MoeFfn(name="moe", ffn_dim=256, num_experts=8, experts_per_token=2),
)
TARGETS = (config.LoraTarget(modules=("ffn.*",), rank=1, alpha=1.0),)


@pytest.mark.parametrize(
    "how",
    [config.Nf4(name="nf4"), config.Int8(name="int8"), config.Fp8(name="fp8", block_size=64)],
    ids=["nf4", "int8", "fp8"],
)
def test_weights_are_quantised_matrix_by_matrix(how: Any, tmp_path: Path) -> None:
    """The host never has a stacked array in full: beside what is kept there are parts of some of the 192 matrices."""
    draw = np.random.default_rng(0).normal
    hf.write(tmp_path, MODEL, "float32", lambda piece: draw(size=piece.shape).astype(np.float32))
    with jax.set_mesh(ONE):
        shapes = parameters(abstract_model(MODEL, config.Compute(), config.Lora(targets=TARGETS, quantize=how)))[1]
        shapes = {path: x for path, x in shapes.items() if "lora" not in path}
        assert all(isinstance(x.sharding, NamedSharding) for x in shapes.values())
        external.load_external_parameters(tmp_path, shapes)  # compiles
        tracemalloc.start()
        found = external.load_external_parameters(tmp_path, shapes)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    whole = unquantized_shapes(shapes)["stacks.0.layers.0.ffn.gate_proj.weight"]
    held = sum(found[f"stacks.0.layers.0.ffn.gate_proj.weight.{part}"].nbytes for part in ("codes", "scales"))
    assert held <= whole.size * (4.5 if how.name == "nf4" else 8.5) / 8
    assert held < peak < sum(x.nbytes for x in found.values()) + whole.size * 2, (held, peak)
