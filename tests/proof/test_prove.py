"""The proof finds every fault that exports of other tools have had, at the export and later."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from moe_train.commands import write_and_prove
from moe_train.commands.verify import verify
from moe_train.machine import progress
from moe_train.weights import texts as text_files
from moe_train.weights.texts import Texts
from tests.proof.exported import LAYOUTS, make
from tests.proof.faults import (
    add_a_tensor,
    change_a_dtype,
    change_template,
    change_tokenizer,
    drop_a_tensor,
    drop_expert_delta,
    flip_a_bit,
    forget_generation,
    swap_experts,
    transpose_rotary,
)

EVERYWHERE = [
    (drop_expert_delta, "tensors"),
    (swap_experts, "tensors"),
    (transpose_rotary, "tensors"),
    (flip_a_bit, "tensors"),
    (change_template, "template"),
    (change_tokenizer, "tokenizer"),
]
SAFETENSORS = [(add_a_tensor, "tensors"), (drop_a_tensor, "tensors"), (change_a_dtype, "tensors")]
CASES = [(layout, dtype, fault, check) for layout, dtype in LAYOUTS for fault, check in EVERYWHERE]
CASES += [(layout, dtype, fault, check) for layout, dtype in LAYOUTS if layout != "gguf" for fault, check in SAFETENSORS]
CASES += [("hf", "bfloat16", forget_generation, "generation")]


@pytest.mark.parametrize(("layout", "dtype", "fault", "check"), CASES)
def test_a_planted_fault_stops_the_export_and_is_found_later(
    layout: Any,
    dtype: str,
    fault: Any,
    check: str,
    exports: Any,
    weights: Any,
    texts: Texts,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    export, base = exports(layout, dtype)
    copy_texts = text_files.write_texts

    def faulty(directory: Path, *arguments: Any) -> None:
        copy_texts(directory, *arguments)
        fault(directory, base, layout)

    monkeypatch.setattr(write_and_prove, "write_texts", faulty)
    with pytest.raises(RuntimeError, match=rf"the proof failed \([^)]*{check}"):
        make(tmp_path / "out", weights, texts, layout, dtype, depth="tensors")
    assert not list(tmp_path.iterdir())

    shutil.copytree(export, tmp_path / "copy")
    fault(tmp_path / "copy", base, layout)
    _, checks = verify(tmp_path / "copy", depth="tensors")
    failed = {check.name for check in checks if check.passed is False}
    assert failed >= {"files", check} - {"tokenizer"}, failed  # a tokenizer's own files are among `files`


@pytest.mark.parametrize("layout", ["hf", "mistral", "gguf"])
def test_whoever_listens_hears_how_far_it_is(layout: str, weights: Any, texts: Texts, tmp_path: Path) -> None:
    heard: list[progress.Progress] = []
    with progress.listening(heard.append):
        make(tmp_path / "made", weights, texts, layout, "bf16" if layout == "gguf" else "bfloat16", depth="tensors")
        verify(tmp_path / "made", base=tmp_path / "made", depth="tensors")
    ended = [at.what for at in heard if at.done == at.total]
    assert ended == ["writing", "reading the files", "reading the files", "comparing with the base"]
    assert all(0 <= at.done <= at.total for at in heard) and len(heard) > 50
