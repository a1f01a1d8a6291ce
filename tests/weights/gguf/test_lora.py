"""GGUF adapters: the deltas that the package `gguf` reads, the same adapter read back, and files that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as package
import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.weights import external_adapter
from moe_train.weights.gguf import container
from moe_train.weights.gguf import lora as gguf_lora
from tests.random_parameters import random_parameters
from tests.tiny import EIGHT, ONE
from tests.weights.gguf.models import LORA, MINISTRAL3, MISTRAL, MISTRAL4, MIXTRAL, shapes


def test_an_adapter_alone(tmp_path: Path) -> None:
    with jax.set_mesh(EIGHT):
        parameters = random_parameters(MIXTRAL, lora=LORA)
        gguf_lora.export_adapter(parameters, MIXTRAL, LORA, tmp_path / "out", base_model="base")
    reader = package.GGUFReader(tmp_path / "out" / gguf_lora.ADAPTER_FILE)
    alpha = reader.get_field("adapter.lora.alpha").contents()
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(found) == 2 * 2 * 5
    assert found["blk.1.ffn_up_exps.weight.lora_a"].shape == (4, 3, 64)
    for module, rank, scale in (("gate", 3, 2.0), ("down", 3, 2.0)):
        a, b = (found[f"blk.1.ffn_{module}_exps.weight.lora_{x}"][2].astype(np.float64) for x in "ab")
        ours = [np.asarray(parameters[f"stacks.0.layers.0.ffn.{module}_proj.lora_{x}"])[1, 2].astype(np.float64) for x in "ab"]
        np.testing.assert_allclose(alpha / rank * b @ a, scale * (ours[0] @ ours[1]).T, rtol=1e-5, atol=1e-7)
    a, b = (found[f"blk.0.attn_q.weight.lora_{x}"].astype(np.float64) for x in "ab")
    q_a, q_b = (np.asarray(parameters[f"stacks.0.layers.0.attention.q_proj.lora_{x}"])[0].astype(np.float64) for x in "ab")
    pairs = q_b.reshape(2, 4, 2, 12).swapaxes(2, 3).reshape(2, 96)  # halves of a head -> pairs side by side
    np.testing.assert_allclose(alpha / 2 * b @ a, 1.5 * (q_a @ pairs).T, rtol=1e-5, atol=1e-7)


def test_an_adapter_is_read_back_on_any_mesh(tmp_path: Path) -> None:
    """With one scale for all, bit for bit; llama.cpp's own converter writes half precision, and no keys of ours."""
    lora = config.Lora(
        targets=(
            config.LoraTarget(modules=("attention.*",), rank=2, alpha=3.0),
            config.LoraTarget(modules=("ffn.*_proj", "ffn.router", "head"), rank=3, alpha=3.0),
        )
    )
    with jax.set_mesh(EIGHT):
        parameters = random_parameters(MIXTRAL, lora=lora)
        gguf_lora.export_adapter(parameters, MIXTRAL, lora, tmp_path / "out", base_model="base")
    with jax.set_mesh(ONE):
        found = external_adapter.read_external_lora(tmp_path / "out", MIXTRAL)
        assert {target.rank: target.alpha for target in found.targets} == {2: 3.0, 3: 3.0}
        wanted = {path: x for path, x in random_parameters(MIXTRAL, lora=found).items() if ".lora_" in path}
        for source in (tmp_path / "out", tmp_path / "out" / gguf_lora.ADAPTER_FILE):
            loaded = external_adapter.load_external_adapter(source, MIXTRAL, shapes(wanted))
            assert loaded.keys() == {path for path in parameters if ".lora_" in path}
            assert all(np.array_equal(np.asarray(x), np.asarray(parameters[path])) for path, x in loaded.items())
    assert len(external_adapter.hash_external_adapter(tmp_path / "out")) == 2 * (2 * 8 + 1) + 1
    with pytest.raises(ValueError, match=r"is for another base: general.architecture is 'llama', not 'mistral3'"):
        external_adapter.read_external_lora(tmp_path / "out", MINISTRAL3)
    with pytest.raises(ValueError, match=r"has blk.0.ffn_down_exps.weight.lora_a, which is not a supported adapter of this model"):
        external_adapter.read_external_lora(tmp_path / "out", MISTRAL)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"adapter.lora.alpha": np.float32(-1)}, "adapter.lora.alpha is -1.0; it has to be a number"),
        ({"adapter.lora.alpha": "much"}, "adapter.lora.alpha is 'much'; it has to be a number"),
        ({"adapter.type": "ia3"}, "is not an adapter: adapter.type is 'ia3'"),
        ({"general.type": "model"}, "is not an adapter: general.type is 'model'"),
    ],
)
def test_a_file_that_is_no_adapter_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    keys |= {"adapter.lora.alpha": np.float32(0), **change}
    ranks = {"blk.0.attn_q": 2, "blk.1.attn_q": 2}

    def write_adapter(ranks: dict[str, int]) -> None:
        specs = [container.GgufSpec(f"{name}.weight.lora_a", (rank, 64), "F32") for name, rank in ranks.items()]
        specs += [container.GgufSpec(f"{name}.weight.lora_b", (96, rank), "F32") for name, rank in ranks.items()]
        container.write_gguf(tmp_path / "x.gguf", keys, specs, lambda spec: [np.zeros(spec.shape, np.float32)])

    write_adapter(ranks)
    with pytest.raises(ValueError, match=said):
        external_adapter.read_external_lora(tmp_path, MISTRAL)
    keys |= {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": np.float32(0)}
    write_adapter(ranks)
    (target,) = external_adapter.read_external_lora(tmp_path, MISTRAL).targets
    assert (target.rank, target.alpha, target.modules) == (2, 2.0, ("attention.q_proj",))  # 0 stands for a scale of 1
    for unequal, state in (({"blk.0.attn_q": 2}, "is missing"), ({**ranks, "blk.1.attn_q": 3}, "has rank 3")):
        write_adapter(unequal)
        with pytest.raises(ValueError, match=rf"blk.0.attn_q.weight.lora_a has rank 2, but blk.1.attn_q.weight.lora_a {state}"):
            external_adapter.read_external_lora(tmp_path, MISTRAL)


LATENT_LORA = config.Lora(
    targets=(
        config.LoraTarget(modules=("attention.o_proj", "ffn.shared.*"), rank=2, alpha=3.0),
        config.LoraTarget(modules=("ffn.gate_proj", "ffn.up_proj", "ffn.down_proj", "ffn.router"), rank=3, alpha=6.0),
    )
)


def test_adapters_that_llama_cpp_applies_to_latent_attention_are_read_back(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        parameters = random_parameters(MISTRAL4, lora=LATENT_LORA)
        gguf_lora.export_adapter(parameters, MISTRAL4, LATENT_LORA, tmp_path / "out", base_model="base")
        read = gguf_lora.read_lora(tmp_path / "out", MISTRAL4)
        written = container.open_gguf(tmp_path / "out/adapter.gguf")
    assert written.settings["general.architecture"] == "mistral4"
    assert {"blk.0.ffn_gate.weight.lora_a", "blk.1.ffn_up_shexp.weight.lora_b", "blk.1.attn_output.weight.lora_a"} <= set(
        written.tensors
    )
    assert {module: target.rank for target in read.targets for module in target.modules} == {
        "attention.o_proj": 2,
        "ffn.shared.gate_proj": 2,
        "ffn.shared.up_proj": 2,
        "ffn.shared.down_proj": 2,
        "ffn.gate_proj": 3,
        "ffn.up_proj": 3,
        "ffn.down_proj": 3,
        "ffn.router": 3,
    }


@pytest.mark.parametrize("module", ["attention.q_a_proj", "head"])
def test_adapters_that_llama_cpp_ignores_are_refused_both_ways(module: str, tmp_path: Path) -> None:
    lora = config.Lora(targets=(config.LoraTarget(modules=(module,), rank=2, alpha=3.0),))
    with jax.set_mesh(ONE):
        parameters = random_parameters(MISTRAL4, lora=lora)
        with pytest.raises(ValueError, match=rf"llama.cpp ignores adapters of .*{module} in mistral4 models"):
            gguf_lora.export_adapter(parameters, MISTRAL4, lora, tmp_path / "out", base_model="base")
    assert not (tmp_path / "out").exists()
    weight = {"attention.q_a_proj": "blk.0.attn_q_a", "head": "output"}[module]
    keys = gguf_lora._settings(MISTRAL4, 3.0, "adapter", "base")
    specs = [container.GgufSpec(f"{weight}.weight.lora_{x}", (2, 2), "F32") for x in "ab"]
    container.write_gguf(tmp_path / "adapter.gguf", keys, specs, lambda _: [np.zeros((2, 2), np.float32)])
    with pytest.raises(ValueError, match=rf"{weight}.weight.lora_a, which llama.cpp ignores in mistral4 models"):
        gguf_lora.read_lora(tmp_path / "adapter.gguf", MISTRAL4)
