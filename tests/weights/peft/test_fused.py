"""Fused experts: PEFT's own product of A and B as the oracle, both of its ways to fill them, and PEFT itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from moe_train import config
from moe_train.machine.mesh import put_batch
from moe_train.model import parameters as flat
from moe_train.model import transformer
from moe_train.weights import external, peft
from tests.random_parameters import abstract
from tests.tiny import MIXTRAL, ONE

E, D, F = 4, MIXTRAL.model_dim, MIXTRAL.ffn.ffn_dim
RANK, ALPHA = {"gate_up_proj": 2, "down_proj": 3}, {"gate_up_proj": 3.0, "down_proj": 12.0}
SIZES = {"gate_up_proj": (D, 2 * F), "down_proj": (F, D)}


def write_adapter(out: Path, swapped: bool, version: str | None = "0.21.2", **more: Any) -> dict[str, np.ndarray]:
    """Files of a random adapter with both parameters; what they add to each, (L, E, out, in), in PEFT's own words."""
    rng, tensors, deltas = np.random.default_rng(0), {}, {}
    for parameter, (into, outof) in SIZES.items():
        into, outof = (outof, into) if swapped else (into, outof)
        deltas[parameter] = []
        for layer in range(MIXTRAL.num_layers):
            wrapper = "experts.base_layer" if parameter == "gate_up_proj" else "experts"
            stem, r = f"base_model.model.model.layers.{layer}.mlp.{wrapper}", RANK[parameter]
            a, b = rng.normal(size=(r * E, into)), rng.normal(size=(outof, r * E))
            tensors |= {f"{stem}.lora_A.weight": a.astype(np.float32), f"{stem}.lora_B.weight": b.astype(np.float32)}
            equation = "ore,eri->eio" if swapped else "ore,eri->eoi"
            delta = np.einsum(equation, b.reshape(outof, r, E), a.reshape(E, r, into))
            deltas[parameter].append(delta * ALPHA[parameter] / r)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "peft_version": version, "target_modules": []}
    settings |= {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    settings |= {"rank_pattern": {"experts.down_proj": 3}, "alpha_pattern": {r".*\.experts\.down_proj": 12}, **more}
    out.mkdir()
    safetensors.numpy.save_file(tensors, out / peft.ADAPTER_WEIGHTS, {"format": "pt"})
    (out / peft.ADAPTER_CONFIG).write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return {parameter: np.array(delta) for parameter, delta in deltas.items()}


def load(directory: Path, model: config.Model = MIXTRAL) -> tuple[config.Lora, dict[str, jax.Array]]:
    lora = peft.read_lora(directory, model)
    with jax.set_mesh(ONE):
        like = {path: x for path, x in abstract(model, lora=lora).items() if path.endswith((".lora_a", ".lora_b"))}
        return lora, peft.load_adapter(directory, model, like)


@pytest.mark.parametrize("swapped", [False, True], ids=["0.21.2", "0.18.1"])
def test_both_ways_of_peft_are_read_by_their_shapes(swapped: bool, tmp_path: Path) -> None:
    wanted = write_adapter(tmp_path / "fused", swapped, version=None)
    lora, ours = load(tmp_path / "fused")
    assert {(t.rank, t.alpha) for t in lora.targets} == {(2, 3.0), (3, 12.0)}
    parts = {"gate": wanted["gate_up_proj"][:, :, :F], "up": wanted["gate_up_proj"][:, :, F:], "down": wanted["down_proj"]}
    for name, delta in parts.items():
        a, b = (np.asarray(ours[f"stacks.0.layers.0.ffn.{name}_proj.lora_{x}"], np.float64) for x in "ab")
        scale = 4.0 if name == "down" else 1.5
        np.testing.assert_allclose(scale * (a @ b), delta.swapaxes(2, 3), rtol=1e-4, atol=1e-5)


def test_square_matrices_need_the_version_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """model_dim 8 is ffn_dim: down's A and B have the same shapes in both ways."""
    square = MIXTRAL.model_copy(update={"ffn": MIXTRAL.ffn.model_copy(update={"ffn_dim": D})})
    monkeypatch.setitem(SIZES, "gate_up_proj", (D, 2 * D))
    monkeypatch.setitem(SIZES, "down_proj", (D, D))
    for swapped, version in ((False, "0.19.1"), (True, "0.19.0"), (False, "0.20.0.dev0@UNKNOWN")):
        out = tmp_path / version
        wanted = write_adapter(out, swapped, version)["down_proj"]
        _, ours = load(out, square)
        a, b = (np.asarray(ours[f"stacks.0.layers.0.ffn.down_proj.lora_{x}"], np.float64) for x in "ab")
        np.testing.assert_allclose(4.0 * (a @ b), wanted.swapaxes(2, 3), rtol=1e-4, atol=1e-5)
    write_adapter(tmp_path / "unsaid", True, None)
    with pytest.raises(ValueError, match=r"can be read in two ways.*does not state peft_version; load and save it with PEFT"):
        load(tmp_path / "unsaid", square)


def test_what_is_no_fused_adapter_of_the_model_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "fused", False)
    with pytest.raises(ValueError, match=r"of shape \(12, 12\) and its lora_B of \(8, 12\) fit neither gate_up_proj nor down_proj"):
        load(tmp_path / "fused", MIXTRAL.model_copy(update={"model_dim": 16}))
    file = tmp_path / "fused" / peft.ADAPTER_WEIGHTS
    tensors = safetensors.numpy.load_file(file)
    stem = "base_model.model.model.layers.1.mlp.experts.base_layer"
    for name in (f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"):
        safetensors.numpy.save_file({key: x for key, x in tensors.items() if key != name}, file)
        with pytest.raises(ValueError, match=f"lacks {name}"):
            load(tmp_path / "fused")
    twice = {key.replace(".base_layer", ""): x for key, x in tensors.items() if ".base_layer" in key}
    safetensors.numpy.save_file({**{k: x for k, x in tensors.items() if ".base_layer" in k}, **twice}, file)
    with pytest.raises(ValueError, match=r"has base_model.*experts\.0\.w1\.lora_A\.weight twice"):
        load(tmp_path / "fused")
    for settings, refusal in (
        ({"rank_pattern": {}}, r"has rank 3 for each of 4 experts, but .* state 2 for model\.layers\.0\.mlp\.experts\.down_proj"),
        ({"target_parameters": None, "target_modules": ["w1", "w2", "w3"]}, "which target_parameters .* does not name"),
        (
            {"target_parameters": ["experts.gate_up_proj"]},
            r"adapts .*mlp\.experts\.down_proj, which target_parameters",
        ),
    ):
        out = tmp_path / refusal[:20]
        write_adapter(out, False, **settings)
        with pytest.raises(ValueError, match=refusal):
            load(out)
    other = {"target_parameters": ["mlp.experts.bias"]}
    write_adapter(tmp_path / "other", False, **other)
    with pytest.raises(ValueError, match=r"target_parameters has 'mlp\.experts\.bias'; supported are mlp"):
        load(tmp_path / "other")


@pytest.mark.judges
def test_a_fused_adapter_that_peft_writes_gives_pefts_logits(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft_library = pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2}
    settings = transformers.MixtralConfig(**sizes, max_position_embeddings=32, sliding_window=None, pad_token_id=None)
    base = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()
    for parameter in base.parameters():
        parameter.data.normal_(0, 0.2)
    base.save_pretrained(tmp_path / "base")
    section = peft_library.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"experts.down_proj": 3},
        alpha_pattern={"experts.down_proj": 12},
    )
    judge = peft_library.get_peft_model(base, section).eval()
    for name, parameter in judge.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    judge.save_pretrained(tmp_path / "adapter")
    tokens = np.random.default_rng(0).integers(0, 64, (1, 20))
    with torch.no_grad():
        theirs = judge(torch.tensor(tokens)).logits.numpy()
        with judge.disable_adapter():
            plain = judge(torch.tensor(tokens)).logits.numpy()

    model = external.read_external_model(tmp_path / "base")
    lora = peft.read_lora(tmp_path / "adapter", model)
    with jax.set_mesh(ONE):
        structure, shapes = flat.parameters(transformer.abstract_model(model, config.Compute(), lora))
        adapters = {path: like for path, like in shapes.items() if path.endswith((".lora_a", ".lora_b"))}
        parameters = external.load_external_parameters(tmp_path / "base", {p: x for p, x in shapes.items() if p not in adapters})
        module = flat.combine(structure, parameters | peft.load_adapter(tmp_path / "adapter", model, adapters))
        batch = put_batch((tokens, np.arange(20)[None], np.ones((1, 20), int)), ONE)
        ours = np.asarray(jax.jit(lambda batch: module.logits(module(*batch)[0]))(batch))
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4
    assert np.abs(theirs - plain).max() / np.abs(theirs).max() > 0.1
