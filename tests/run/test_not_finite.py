"""What is said of a step that is not finite: in which order, of which records, with which remedy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_train import config
from moe_train.run.not_finite import Diagnosis, FirstFault, first_fault
from moe_train.train.finite import StepFlags
from tests.run.tiny_config import MODEL

ALL = np.array(True)


def layers(*flags: bool) -> np.ndarray:
    return np.array(flags)


@pytest.mark.parametrize(
    ("gradients", "first"),
    [
        ({"embed.weight": ~ALL, "stacks.0.layers.0.attention.q_proj.weight": layers(False, True)}, "layer 0 attention.q_proj"),
        (
            {
                "stacks.0.layers.0.ffn.router.weight": layers(True, False),
                "stacks.0.layers.0.ffn.down_proj.lora_a": layers(False, False),
            },
            "layer 1 ffn.down_proj",
        ),
        (
            {
                "stacks.0.layers.0.attention.o_proj.weight": layers(True, False),
                "stacks.0.layers.0.attention.v_proj.weight": layers(True, False),
                "stacks.0.layers.0.ffn_norm.scale": layers(False, True),
            },
            "layer 1 attention.o_proj",
        ),
        ({"final_norm.scale": ~ALL, "stacks.0.layers.0.ffn.up_proj.weight": layers(False, False)}, "final_norm"),
    ],
)
def test_gradients_are_named_in_the_order_of_the_backward_pass(gradients: dict[str, Any], first: str) -> None:
    model = config.Model.model_validate(MODEL, strict=False)
    flags = StepFlags({"embed.weight": ALL}, {"embed": np.ones((2, 4), bool)}, ALL, gradients)
    assert first_fault(model, flags) == FirstFault(f"the gradient of {first}", "gradient")


def diagnosis(**optimizer: Any) -> Diagnosis:
    """A diagnosis of two rows with two records each, of lengths 2 and 2."""
    run = SimpleNamespace(
        run_dir="runs/a",
        train=SimpleNamespace(batch_size=2, spike_guard=None),
        compute=SimpleNamespace(dtype="bfloat16"),
        optimizer=SimpleNamespace(learning_rate=0.5, **{"max_grad_norm": None, **optimizer}),
    )

    def trace(step: int, row: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(file="a.jsonl", number=10 * step + 2 * row + i, length=2) for i in (1, 2)]

    return Diagnosis(run, None, SimpleNamespace(trace=trace), {})  # type: ignore[arg-type]


def test_the_records_of_the_positions_are_named() -> None:
    bad_BT = np.zeros((2, 4), bool)
    bad_BT[1, 2] = True
    expected = "1 of the 4 records of the step: a.jsonl:34 (moe-train data trace runs/a/config.yaml --step 4)"
    assert diagnosis()._records(4, bad_BT) == expected
    assert diagnosis()._records(4, None).startswith("the 4 records of the step: a.jsonl:31, a.jsonl:32, a.jsonl:33, a.jsonl:34 (")
    assert "look at these records (moe-train data show)" in diagnosis()._remedy(FirstFault("", "output", bad_BT))


def test_remedies_name_settings_that_are_not_in_use_yet() -> None:
    remedy = diagnosis()._remedy(FirstFault("", "gradient"))
    for part in ("(0.5)", "spike_guard", "max_grad_norm", "compute.dtype float32"):
        assert part in remedy
    assert "max_grad_norm" not in diagnosis(max_grad_norm=1.0)._remedy(FirstFault("", "gradient"))
    assert "earlier checkpoint" in diagnosis()._remedy(FirstFault("", "weights"))
