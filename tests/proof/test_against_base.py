"""MergeResult files against the base alone, and against base and adapter."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from moe_train.commands import write_and_prove
from moe_train.commands.verify import verify
from moe_train.weights import peft
from tests.proof.exported import LORA, MODEL
from tests.proof.faults import (
    change_router,
    drop_expert_delta,
    forge,
    scale_expert,
    swap_experts,
    transpose_rotary,
)
from tests.tiny import ONE

FAULTS = {
    drop_expert_delta: r"is the base's: its delta is gone \(1 such",
    swap_experts: "the base's is not of rank 2",
    transpose_rotary: "the base's is not of rank 2",
    scale_expert: "the base's is not of rank 2",
    change_router: "was not adapted, and is not the base's",
}


@pytest.mark.parametrize(("layout", "dtype"), [("hf", "bfloat16"), ("mistral", "float32"), ("gguf", "q8_0")])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_base_alone_shows_whether_files_are_a_merge(layout: str, dtype: str, fault: Any, exports: Any, tmp_path: Path) -> None:
    """Whatever layout the base has; also where the record was brought in line with the files."""
    export, own_base = exports(layout, dtype)
    base = exports("hf", "float32")[1]
    _, checks = verify(export, base=base, depth="tensors")
    assert [check.summary for check in checks if check.name == "merge" and not check.passed] == []
    shutil.copytree(export, tmp_path / "copy")
    fault(tmp_path / "copy", own_base, layout)
    forge(tmp_path / "copy")
    _, checks = verify(tmp_path / "copy", base=base, depth="tensors")
    (merge,) = (check for check in checks if check.name == "merge")
    if (layout, fault) == ("gguf", drop_expert_delta):
        assert "cannot be distinguished from rounding" in merge.summary
        return
    assert merge.passed is False and re.search(FAULTS[fault], merge.summary), merge


@pytest.mark.parametrize(("layout", "dtype"), [("hf", "bfloat16"), ("gguf", "q8_0")])
def test_base_and_adapter_show_every_delta(layout: str, dtype: str, exports: Any, weights: Any, tmp_path: Path) -> None:
    export, own_base = exports(layout, dtype)
    base = exports("hf", "float32")[1]
    with jax.set_mesh(ONE):
        peft.export_adapter(weights, MODEL, LORA, tmp_path / "adapter", base_model=str(base))
    _, checks = verify(export, base=base, adapter=tmp_path / "adapter", depth="tensors")
    assert [check.summary for check in checks if check.name == "merge" and check.passed] != []
    shutil.copytree(export, tmp_path / "copy")
    drop_expert_delta(tmp_path / "copy", own_base, layout)
    forge(tmp_path / "copy")
    _, checks = verify(tmp_path / "copy", base=base, adapter=tmp_path / "adapter", depth="tensors")
    (merge,) = (check for check in checks if check.name == "merge")
    assert merge.passed is False and "with its adapter" in merge.summary
    with pytest.raises(ValueError, match="state --adapter and --base, or --run"):
        verify(export, adapter=tmp_path / "adapter")
    other = MODEL.model_copy(update={"num_layers": 1})
    with jax.set_mesh(ONE):
        one = {path: x[:1] if path.startswith("stacks.") else x for path, x in weights.items() if ".lora_" not in path}
        write_and_prove.export_model(one, other, tmp_path / "other", write_and_prove.WriteOptions(dtype="float32", depth="tensors"))
    _, checks = verify(export, base=tmp_path / "other", depth="tensors")
    assert [check.summary for check in checks if check.name == "merge"] == [
        "the files describe another model: num_layers is 1, not 2"
    ]
