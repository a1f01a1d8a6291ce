"""A proof that is repeated later, with what is there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from moe_train.commands.verify import verify
from moe_train.proof import prove as proof
from moe_train.proof import repeat, surroundings
from moe_train.weights import external
from tests.proof.exported import LAYOUTS, LORA
from tests.proof.faults import (
    drop_expert_delta,
    forge,
    swap_experts,
    transpose_rotary,
)
from tests.tiny import ONE


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS)
def test_a_good_export_passes_everything_again(layout: str, dtype: str, exports: Any) -> None:
    export, _ = exports(layout, dtype)
    record, checks = verify(export)
    assert {check.name: check.passed for check in checks} == {
        **{"files": True, "architecture": True, "tensors": True, "merge": None, "answers": True, "template": True},
        "generation": None if layout == "mistral" else True,
    }
    by_name = {check["name"]: check for check in record["checks"]}
    assert all(check["passed"] for name, check in by_name.items() if not (layout == "mistral" and name == "generation"))
    assert by_name["merge"]["figures"]["count"] == 2 * (4 + 3 * 4) and by_name["template"]["figures"]["training"] == 1
    assert by_name["answers"]["figures"]["positions"] > 30
    assert set(record["files"]) == {file.name for file in export.iterdir()} - {"export_proof.json"}


@pytest.mark.parametrize("fault", [drop_expert_delta, swap_experts, transpose_rotary])
@pytest.mark.parametrize(("layout", "dtype"), [("hf", "bfloat16"), ("mistral", "float32"), ("gguf", "q8_0")])
def test_the_answers_alone_find_what_changes_the_model(layout: str, dtype: str, fault: Any, exports: Any, tmp_path: Path) -> None:
    export, base = exports(layout, dtype)
    shutil.copytree(export, tmp_path / "copy")
    fault(tmp_path / "copy", base, layout)
    forge(tmp_path / "copy")
    _, checks = verify(tmp_path / "copy")
    assert [check.name for check in checks if check.passed is False] == ["answers"]


def test_merged_again_from_the_weights_in_memory(exports: Any, weights: Any, tmp_path: Path) -> None:
    """What `verify --run` does; and --base with the base's own files."""
    export, base = exports("hf", "bfloat16")
    record, model = repeat.read_record(export)

    def merge(directory: Path, parameters: dict[str, jax.Array], **more: Any) -> Any:
        with jax.set_mesh(ONE):
            trained = proof.Export(directory, "hf", "bfloat16", parameters, model, LORA, None, None)
            checks = repeat.repeat(directory, "tensors", record, model, trained if parameters else None, **more)
        return next(check for check in checks if check.name == "merge")

    assert merge(export, weights).passed
    path = "stacks.0.layers.0.ffn.up_proj.lora_b"
    other = merge(export, {**weights, path: weights[path] * 1.5})
    assert other.passed is False and "with its adapter" in other.summary
    of_base = merge(export, {}, base=external.open_external_weights(base))
    assert of_base.passed and of_base.metrics["count"] == 3 + 2 * 3  # norms, router, both ends
    assert of_base.metrics["adapted"] == 2 * (4 + 3 * 4) and of_base.metrics["untrained"] == 0


def test_a_record_that_is_none_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no export_proof\.json; only directories that `moe-train export` wrote"):
        verify(tmp_path)
    for text in ("{}", "[]", "{", '{"format": "hf", "files": {}, "tensors": {}, "model": 3}', '{"format": 1, "files": 1}'):
        (tmp_path / surroundings.RECORD_FILE).write_text(text)
        with pytest.raises(ValueError, match=r"^[^\n]*export_proof\.json[^\n]*$"):
            verify(tmp_path)
