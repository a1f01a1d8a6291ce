"""The proof finds every fault that exports of other tools have had, at the export and later."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train.commands import write_and_prove
from moe_train.commands.verify import verify
from moe_train.machine import progress
from moe_train.proof import expected
from moe_train.proof import prove as proof
from moe_train.weights import peft
from moe_train.weights import texts as text_files
from moe_train.weights.gguf import lora as gguf_lora
from moe_train.weights.mistral import lora as mistral_lora
from moe_train.weights.texts import Texts
from tests.proof.exported import CHAT, LAYOUTS, LORA, MODEL, make
from tests.proof.faults import (
    add_a_tensor,
    change_a_dtype,
    change_template,
    change_tokenizer,
    drop_a_tensor,
    drop_expert_delta,
    expert,
    flip_a_bit,
    forget_generation,
    patch,
    rewrite,
    swap_experts,
    transpose_rotary,
)
from tests.tiny import ONE

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


def write_adapter(layout: str, directory: Path, weights: dict[str, jax.Array], texts: Texts) -> None:
    if layout == "peft":
        peft.export_adapter(weights, MODEL, LORA, directory, base_model="base", texts=texts)
    elif layout == "gguf-lora":
        gguf_lora.export_adapter(weights, MODEL, LORA, directory, base_model="base", texts=texts)
    else:
        mistral_lora.export_adapter(weights, MODEL, LORA, directory, dtype="float32", texts=texts)


def double_scale(directory: Path, layout: str) -> None:
    file = directory / ("adapter_config.json" if layout == "peft" else "params.json")
    settings = json.loads(file.read_text())
    section, key = (settings, "lora_alpha") if layout == "peft" else (settings["lora"], "scaling")
    section[key] *= 2
    file.write_text(json.dumps(settings))


@pytest.mark.parametrize("layout", ["peft", "mistral-lora"])
def test_a_fault_in_an_adapter_is_found(layout: Any, weights: Any, texts: Texts, tmp_path: Path) -> None:
    def prove(directory: Path) -> dict[str, Any]:
        with jax.set_mesh(ONE):
            return proof.prove_adapter(directory, layout, weights, MODEL, LORA, texts.tokenizer, texts.chat_template, [CHAT], {})

    write_adapter(layout, tmp_path / "good", weights, texts)
    proof.write(tmp_path / "good", prove(tmp_path / "good"))
    _, checks = verify(tmp_path / "good")
    assert not [check for check in checks if check.passed is False]
    first, second = (expected.adapter_names(layout, expert("hf" if layout == "peft" else "mistral", e)[0])[1] for e in (0, 1))

    def zero(tensors: dict[str, np.ndarray]) -> None:
        tensors[first] = np.zeros_like(tensors[first])

    def swap(tensors: dict[str, np.ndarray]) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    def drop(tensors: dict[str, np.ndarray]) -> None:
        del tensors[first]

    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["extra"] = np.ones(3, np.float32)

    with pytest.raises(RuntimeError, match=r"\(deltas\): the adapter of .* in the files is not the one in memory"):
        shutil.copytree(tmp_path / "good", tmp_path / "rescale")
        double_scale(tmp_path / "rescale", layout)
        prove(tmp_path / "rescale")
    for fault, check in ((zero, "deltas"), (swap, "deltas"), (drop, "tensors"), (add, "tensors")):
        directory = tmp_path / fault.__name__
        shutil.copytree(tmp_path / "good", directory)
        rewrite(directory, fault)
        with pytest.raises(RuntimeError, match=rf"the proof failed \([^)]*{check}"):
            prove(directory)
        _, checks = verify(directory)
        assert {"files", "tensors"} <= {check.name for check in checks if check.passed is False}


def test_a_fault_in_a_gguf_adapter_is_found(weights: Any, texts: Texts, tmp_path: Path) -> None:
    write_adapter("gguf-lora", tmp_path / "good", weights, texts)
    arguments = ("gguf-lora", weights, MODEL, LORA, None, None, [], {})
    with jax.set_mesh(ONE):
        record = proof.prove_adapter(tmp_path / "good", *arguments)
        proof.write(tmp_path / "good", record)
        (deltas,) = (check for check in record["checks"] if check["name"] == "deltas")
        assert deltas["figures"]["count"] == 2 * (4 + 3 * 4) and not deltas["figures"]["untrained"]
        name = "blk.1.ffn_down_exps.weight.lora_b"
        shutil.copytree(tmp_path / "good", tmp_path / "zero")
        patch(tmp_path / "zero", name, lambda rows: np.where(np.arange(len(rows))[:, None] < 32, 0, rows))  # of expert 0
        with pytest.raises(RuntimeError, match=r"\(deltas\): .*down_proj\[1, 0\] in the files is not .* \(1 matrices in all\)"):
            proof.prove_adapter(tmp_path / "zero", *arguments)
        patch(tmp_path / "good", name, lambda rows: np.roll(rows, 32, axis=0))
        with pytest.raises(RuntimeError, match=r"\(deltas\): the adapter of stacks\.0\.layers\.0\.ffn\.down_proj\[1, 0\]"):
            proof.prove_adapter(tmp_path / "good", *arguments)
    _, checks = verify(tmp_path / "good")
    assert {check.name for check in checks if check.passed is False} == {"files", "tensors"}


def test_what_was_trained_in_full_beside_an_adapter_is_compared(weights: Any, texts: Texts, tmp_path: Path) -> None:
    lora = LORA.model_copy(update={"train": ("*norm", "ffn.router", "embed")})
    peft.export_adapter(weights, MODEL, lora, tmp_path / "out", base_model="base", texts=texts)
    with jax.set_mesh(ONE):
        proof.prove_adapter(tmp_path / "out", "peft", weights, MODEL, lora, None, None, [], {})
        moved = {**weights, "stacks.0.layers.0.ffn.router.weight": weights["stacks.0.layers.0.ffn.router.weight"] + 1}
        with pytest.raises(RuntimeError, match=r"\(tensors\): .*mlp\.gate\.weight .* is not stacks"):
            proof.prove_adapter(tmp_path / "out", "peft", moved, MODEL, lora, None, None, [], {})
