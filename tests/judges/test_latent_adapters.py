"""PEFT as the judge of adapters of latent attention and of every expert, on transformers' Mistral 4 and DeepSeek V3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.machine.mesh import put_batch
from moe_train.model.parameters import Parameters, combine, parameters
from moe_train.model.transformer import abstract_model
from moe_train.proof import base_modules
from moe_train.proof.checks import Fault
from moe_train.proof.prove_adapter import AdapterExport, prove_adapter
from moe_train.weights import peft, safetensors_files
from tests.random_parameters import abstract, random_parameters
from tests.tiny import DEEPSEEK_V3, MISTRAL4, ONE

pytestmark = pytest.mark.judges

LORA = config.Lora(
    targets=(
        config.LoraTarget(modules=("attention.q_*", "attention.kv_*"), rank=2, alpha=3.0),
        config.LoraTarget(modules=("attention.o_proj", "ffn.shared.*"), rank=3, alpha=6.0),
        config.LoraTarget(modules=("head", "ffn.down_proj"), rank=3, alpha=5.0),
        config.LoraTarget(modules=("ffn.gate_proj",), rank=2, alpha=1.0),
        config.LoraTarget(modules=("ffn.up_proj",), rank=3, alpha=4.0),
    )
)
"""Gate and up, which PEFT adapts as one parameter, differ in rank and scale."""
WITH_ROUTER = LORA.model_copy(update={"targets": (*LORA.targets, config.LoraTarget(modules=("ffn.router",), rank=2, alpha=1.0))})
TOKENS = np.random.default_rng(0).integers(0, MISTRAL4.vocab_size, (1, 20)).astype(np.int32)


def judge(weights: Parameters, model: config.Model, folder: Path) -> Any:
    """transformers' model with the base's weights, from their export."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with jax.set_mesh(ONE):
        options = write_and_prove.WriteOptions(dtype="float32", depth="tensors")
        write_and_prove.export_model(weights, model, folder, options)
    torch.set_num_threads(1)
    auto_class = transformers.AutoModelForImageTextToText if model is MISTRAL4 else transformers.AutoModelForCausalLM
    return auto_class.from_pretrained(folder, attn_implementation="eager").eval()


def our_logits(weights: Parameters, model: config.Model, lora: config.Lora | None) -> np.ndarray:
    with jax.set_mesh(ONE):
        structure, _ = parameters(abstract_model(model, config.Compute(), lora))
        arrays = put_batch((TOKENS, np.arange(20, dtype=np.int32)[None], np.ones_like(TOKENS)), ONE)

        @jax.jit
        def run(weights: Parameters) -> jax.Array:
            module = combine(structure, weights)
            return module.logits(module(*arrays)[0])

        return np.asarray(run(weights))


def logits_of(model: Any) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        pytest.param(MISTRAL4, WITH_ROUTER, id="mistral4"),
        pytest.param(DEEPSEEK_V3, WITH_ROUTER, id="deepseek_v3", marks=pytest.mark.slow),
    ],
)
def test_peft_applies_an_adapter_and_writes_one_that_is_read(model: config.Model, lora: config.Lora, tmp_path: Path) -> None:
    library = pytest.importorskip("peft")
    with jax.set_mesh(ONE):
        weights = random_parameters(model, lora=lora, scale=0.2)
    base = {path: x for path, x in weights.items() if ".lora_" not in path}
    theirs = judge(base, model, tmp_path / "base")
    plain = logits_of(theirs)
    peft.export_adapter(weights, model, lora, tmp_path / "out", base_model="b")
    prove_adapter(AdapterExport(tmp_path / "out", "peft", weights, model, lora, None, None, base=tmp_path / "base"))
    adapted = library.PeftModel.from_pretrained(theirs, tmp_path / "out")
    ours = our_logits(weights, model, lora)
    assert distance(ours, logits_of(adapted)) < 1e-4
    assert distance(ours, plain) > 1e-2
    # No other module got an adapter.
    written = safetensors_files.open_safetensors(tmp_path / "out/adapter_model.safetensors")
    assert sum(".lora_" in name for name, _ in adapted.named_parameters()) == len(written)
    adapted.save_pretrained(tmp_path / "theirs")
    read = peft.read_lora(tmp_path / "theirs", model)
    with jax.set_mesh(ONE):
        like = {path: x for path, x in abstract(model, lora=read).items() if ".lora_" in path}
        loaded = peft.load_adapter(tmp_path / "theirs", model, like)
    assert loaded.keys() == {path for path in weights if ".lora_" in path}
    assert distance(our_logits({**base, **loaded}, model, read), ours) < 1e-5


def test_the_proof_finds_names_that_peft_takes_for_others(tmp_path: Path) -> None:
    """Dense first layers and shared experts have the same last names, which PEFT takes for routed experts in a DeepSeek V3."""
    lora = config.Lora(targets=(config.LoraTarget(modules=("attention.o_proj", "ffn.shared.*"), rank=3, alpha=6.0),))
    last_names = ["o_proj", "gate_proj", "up_proj", "down_proj"]
    faults = {MISTRAL4: r"also selects model\.layers\.0\.mlp", DEEPSEEK_V3: "PEFT takes for the routed experts of a deepseek_v3"}
    for model, message in faults.items():
        folder = tmp_path / model.family
        with jax.set_mesh(ONE):
            peft.export_adapter(random_parameters(model, lora=lora), model, lora, folder, base_model="b")
        written = safetensors_files.open_safetensors(folder / "adapter_model.safetensors")
        settings = peft.read_settings(folder)
        modules = base_modules.exported_modules(model)
        assert base_modules.check_adapter_names(written, settings, modules).metrics["count"] == len(written) // 2
        with pytest.raises(Fault, match=message):
            settings = {**settings, "target_modules": last_names, "target_parameters": None}
            base_modules.check_adapter_names(written, settings, modules)
