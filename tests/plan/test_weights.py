"""The weights of a run with their shardings, from shapes alone."""

from __future__ import annotations

import pytest

from moe_train.plan.weights import axis_sizes, divisions, layout
from tests.plan.pretraining import SMALL, pretrain_run


def test_divisions() -> None:
    assert sorted(divisions(4, 2)) == [(1, 4), (2, 2), (4, 1)]
    assert len(list(divisions(64, 4))) == 84  # ways to hand six factors of two to four axes


def test_the_kinds_of_weights_and_what_a_device_stores_of_them() -> None:
    run = pretrain_run(*SMALL, "mesh={fsdp: 2, expert: 4}")
    laid = layout(run)
    kinds = {str(weight.path): weight for weight in laid.weights}
    assert kinds["embed.weight"].kind == "table" and kinds["final_norm.scale"].kind == "small"
    assert kinds["stacks.0.layers.0.attention.q_proj.weight"].kind == "linear"
    gate = kinds["stacks.0.layers.0.ffn.gate_proj.weight"]
    assert (gate.kind, gate.layers, gate.shape) == ("expert", 4, (8, 512, 1024))
    sizes = axis_sizes(run.mesh)
    assert gate.elements(sizes) == 8 * 512 * 1024 // 8 and gate.elements(sizes, ("fsdp",)) == 8 * 512 * 1024 // 4
    assert gate.stored_bytes(sizes) == 4 * gate.elements(sizes) * gate.itemsize
    trained = sum(weight.stored_bytes(sizes) for weight in laid.weights if weight.trainable)
    assert laid.optimizer_bytes == pytest.approx(2 * trained, rel=1e-3)  # two moments, and counters
    for rounding, copies in (("nearest", 2), ("stochastic", 4), ("float32_master", 6)):  # of two bytes, for each parameter
        low = layout(
            pretrain_run(*SMALL, "mesh={fsdp: 2, expert: 4}", "compute.param_dtype=bfloat16", f"optimizer.rounding={rounding}")
        )
        assert low.optimizer_bytes == pytest.approx(copies * trained / 2, rel=1e-3)
