"""The proof of adapter files finds every fault that is planted in them, at the export and later."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train.commands.verify import verify
from moe_train.proof import expected
from moe_train.proof.prove import write_record
from moe_train.proof.prove_adapter import AdapterExport, prove_adapter
from moe_train.weights import peft
from moe_train.weights.gguf import lora as gguf_lora
from moe_train.weights.mistral import lora as mistral_lora
from moe_train.weights.texts import Texts
from tests.proof.exported import CHAT, LORA, MODEL
from tests.proof.faults import expert, patch, rewrite
from tests.tiny import ONE


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
            return prove_adapter(
                AdapterExport(directory, layout, weights, MODEL, LORA, texts.tokenizer, texts.chat_template, [CHAT])
            )

    write_adapter(layout, tmp_path / "good", weights, texts)
    write_record(tmp_path / "good", prove(tmp_path / "good"))
    _, checks = verify(tmp_path / "good")
    assert not [check for check in checks if check.passed is False]
    first, second = (expected.adapter_names(layout, expert("hf" if layout == "peft" else "mistral", e)[0])[1] for e in (0, 1))

    def zero(tensors: dict[str, np.ndarray]) -> None:
        tensors[first] = np.zeros_like(tensors[first])

    def swap(tensors: dict[str, np.ndarray]) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    def poison(tensors: dict[str, np.ndarray]) -> None:
        tensors[first] = np.full_like(tensors[first], np.nan)

    def drop(tensors: dict[str, np.ndarray]) -> None:
        del tensors[first]

    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["extra"] = np.ones(3, np.float32)

    with pytest.raises(RuntimeError, match=r"\(deltas\): the adapter of .* in the files is not the one in memory"):
        shutil.copytree(tmp_path / "good", tmp_path / "rescale")
        double_scale(tmp_path / "rescale", layout)
        prove(tmp_path / "rescale")
    for fault, check in ((zero, "deltas"), (swap, "deltas"), (poison, "deltas"), (drop, "tensors"), (add, "tensors")):
        directory = tmp_path / fault.__name__
        shutil.copytree(tmp_path / "good", directory)
        rewrite(directory, fault)
        with pytest.raises(RuntimeError, match=rf"the proof failed \([^)]*{check}"):
            prove(directory)
        _, checks = verify(directory)
        assert {"files", "tensors"} <= {check.name for check in checks if check.passed is False}


def test_a_fault_in_a_gguf_adapter_is_found(weights: Any, texts: Texts, tmp_path: Path) -> None:
    write_adapter("gguf-lora", tmp_path / "good", weights, texts)

    def export(name: str) -> AdapterExport:
        return AdapterExport(tmp_path / name, "gguf-lora", weights, MODEL, LORA, None, None)

    with jax.set_mesh(ONE):
        record = prove_adapter(export("good"))
        write_record(tmp_path / "good", record)
        (deltas,) = (check for check in record["checks"] if check["name"] == "deltas")
        assert deltas["figures"]["count"] == 2 * (4 + 3 * 4) and not deltas["figures"]["untrained"]
        name = "blk.1.ffn_down_exps.weight.lora_b"
        shutil.copytree(tmp_path / "good", tmp_path / "zero")
        patch(tmp_path / "zero", name, lambda rows: np.where(np.arange(len(rows))[:, None] < 32, 0, rows))  # of expert 0
        with pytest.raises(RuntimeError, match=r"\(deltas\): .*down_proj\[1, 0\] in the files is not .* \(1 matrices in all\)"):
            prove_adapter(export("zero"))
        patch(tmp_path / "good", name, lambda rows: np.roll(rows, 32, axis=0))
        with pytest.raises(RuntimeError, match=r"\(deltas\): the adapter of stacks\.0\.layers\.0\.ffn\.down_proj\[1, 0\]"):
            prove_adapter(export("good"))
    _, checks = verify(tmp_path / "good")
    assert {check.name for check in checks if check.passed is False} == {"files", "tensors"}


def test_what_was_trained_in_full_beside_an_adapter_is_compared(weights: Any, texts: Texts, tmp_path: Path) -> None:
    lora = LORA.model_copy(update={"train": ("*norm", "ffn.router", "embed")})
    peft.export_adapter(weights, MODEL, lora, tmp_path / "out", base_model="base", texts=texts)
    with jax.set_mesh(ONE):
        prove_adapter(AdapterExport(tmp_path / "out", "peft", weights, MODEL, lora, None, None))
        changed = {**weights, "stacks.0.layers.0.ffn.router.weight": weights["stacks.0.layers.0.ffn.router.weight"] + 1}
        with pytest.raises(RuntimeError, match=r"\(tensors\): .*mlp\.gate\.weight .* is not stacks"):
            prove_adapter(AdapterExport(tmp_path / "out", "peft", changed, MODEL, lora, None, None))
