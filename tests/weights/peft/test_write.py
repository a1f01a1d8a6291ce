"""PEFT directories, torch-free: what is written, what is read back, and what cannot be written."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from moe_train import config
from moe_train.weights import peft, texts
from tests.random_parameters import random_parameters
from tests.tiny import EIGHT, MISTRAL4, ONE
from tests.weights.peft.adapters import BY_EXPERT, LORA, MIXTRAL, abstract, adapters, lora_of, settings_in, trained


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_read_back_bit_for_bit_on_any_mesh(dtype: str, tmp_path: Path) -> None:
    with jax.set_mesh(EIGHT):
        parameters = adapters(LORA, dtype)
        peft.export_adapter(parameters, MIXTRAL, LORA, tmp_path / "out", base_model="some/base")
    with safetensors.safe_open(tmp_path / "out/adapter_model.safetensors", "np") as written:
        assert len(list(written.keys())) == 2 * 2 * (2 + 3 * 4)
    read = peft.read_lora(tmp_path / "out", MIXTRAL)
    assert {(t.rank, t.alpha): set(t.modules) for t in read.targets} == {
        (2, 3.0): {"attention.q_proj"},
        (3, 6.0): {"attention.o_proj", "ffn.gate_proj", "ffn.up_proj", "ffn.down_proj"},
    }
    with jax.set_mesh(ONE):
        loaded = peft.load_adapter(tmp_path / "out", MIXTRAL, abstract(read, dtype))
    assert set(loaded) == set(parameters)
    for path, array in loaded.items():
        assert array.dtype == parameters[path].dtype and np.array_equal(np.asarray(array), np.asarray(parameters[path])), path


def test_the_files_of_an_adapter(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        parameters = adapters(LORA)
        peft.export_adapter(parameters, MIXTRAL, LORA, tmp_path / "out", base_model="some/base", texts=texts.Texts(config="a: 1\n"))
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "moe_train.yaml",
    ]
    settings = settings_in(tmp_path / "out")
    assert settings["target_modules"] == ["o_proj", "q_proj", "w1", "w2", "w3"]
    assert (settings["r"], settings["lora_alpha"]) == (3, 6)
    assert (settings["rank_pattern"], settings["alpha_pattern"]) == ({"q_proj": 2}, {"q_proj": 3})
    assert settings["base_model_name_or_path"] == "some/base"
    found = safetensors.numpy.load_file(tmp_path / "out/adapter_model.safetensors")
    name = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w2"
    ours = "stacks.0.layers.0.ffn.down_proj"
    assert np.array_equal(found[f"{name}.lora_A.weight"], np.asarray(parameters[f"{ours}.lora_a"])[1, 2].T)
    assert np.array_equal(found[f"{name}.lora_B.weight"], np.asarray(parameters[f"{ours}.lora_b"])[1, 2].T)


def test_experts_come_with_all_three_matrices_and_one_rank(tmp_path: Path) -> None:
    lora = lora_of(("ffn.gate_proj", 3, 6.0), ("ffn.up_proj", 2, 3.0))
    with jax.set_mesh(ONE):
        peft.export_adapter(adapters(lora), MIXTRAL, lora, tmp_path / "out", base_model="b")
    written = safetensors.numpy.load_file(tmp_path / "out/adapter_model.safetensors")
    zeros = {name for name, x in written.items() if not x.any()}
    assert len(zeros) == 2 * 2 * 4 and all(".w2." in name for name in zeros), "PEFT has to see w2"
    (target,) = peft.read_lora(tmp_path / "out", MIXTRAL).targets
    assert (target.rank, target.alpha, set(target.modules)) == (3, 6.0, {"ffn.gate_proj", "ffn.up_proj", "ffn.down_proj"})


def test_a_model_without_adapter_has_none_to_export(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter to export"):
        peft.export_adapter({}, MIXTRAL, LORA, tmp_path / "out", base_model="b")


def test_both_ends_the_router_and_what_was_trained_in_full(tmp_path: Path) -> None:
    """Names, settings and values; read back into the same arrays on another mesh."""
    lora = config.Lora(
        targets=(
            config.LoraTarget(modules=("attention.q_proj", "embed", "ffn.router"), rank=2, alpha=4.0),
            config.LoraTarget(modules=("attention.k_proj",), rank=3, alpha=4.0),
        ),
        dropout=0.25,
        train=("*_norm", "head"),
    )
    with jax.set_mesh(EIGHT):
        parameters = trained(lora)
        peft.export_adapter(parameters, MIXTRAL, lora, tmp_path / "out", base_model="b")
    settings = settings_in(tmp_path / "out")
    assert settings["target_modules"] == ["embed_tokens", "gate", "k_proj", "q_proj"]
    assert settings["modules_to_save"] == ["input_layernorm", "lm_head", "model.norm", "post_attention_layernorm"]
    assert settings["lora_dropout"] == 0  # PEFT has none beside a router
    found = safetensors.numpy.load_file(tmp_path / "out/adapter_model.safetensors")
    body = "base_model.model.model"
    ours = {path: np.asarray(x) for path, x in parameters.items()}
    assert np.array_equal(found[f"{body}.embed_tokens.lora_embedding_A"], ours["embed.lora_a"].T)
    assert np.array_equal(found[f"{body}.embed_tokens.lora_embedding_B"], ours["embed.lora_b"].T)
    assert np.array_equal(found["base_model.model.lm_head.weight"], ours["head.weight"])
    assert np.array_equal(found[f"{body}.layers.1.input_layernorm.weight"], ours["stacks.0.layers.0.attention_norm.scale"][1])
    name = f"{body}.layers.1.block_sparse_moe.gate.lora_B.weight"
    assert np.array_equal(found[name], ours["stacks.0.layers.0.ffn.router.lora_b"][1].T)

    read = peft.read_lora(tmp_path / "out", MIXTRAL)
    assert {m: (t.rank, t.alpha) for t in read.targets for m in t.modules} == {
        **dict.fromkeys(("attention.q_proj", "embed", "ffn.router"), (2, 4.0)),
        "attention.k_proj": (3, 4.0),
    }
    assert read.train == ("attention_norm", "ffn_norm", "final_norm", "head")
    with jax.set_mesh(ONE):
        like = trained(read)
        loaded = peft.load_adapter(tmp_path / "out", MIXTRAL, jax.eval_shape(lambda: like))
    assert loaded.keys() == parameters.keys()
    assert all(np.array_equal(np.asarray(x), ours[path]) for path, x in loaded.items())


def test_experts_that_differ_share_rank_and_scale_in_the_file(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        parameters = trained(BY_EXPERT)
        peft.export_adapter(parameters, MIXTRAL, BY_EXPERT, tmp_path / "out", base_model="b")
    settings = settings_in(tmp_path / "out")
    assert (settings["r"], settings["rank_pattern"], settings["alpha_pattern"], settings["use_rslora"]) == (3, {}, {}, False)
    found = safetensors.numpy.load_file(tmp_path / "out/adapter_model.safetensors")
    zeros = [name for name, x in found.items() if name.endswith("lora_B.weight") and not x.any()]
    assert len(zeros) == 2 * 3 and all("experts.1." in name for name in zeros), "expert 1 has no adapter"
    for e, scale in ((0, 6 / 3**0.5), (1, 0), (2, 6 / 3**0.5), (3, 1 / 2**0.5)):
        name, ours = f"base_model.model.model.layers.1.block_sparse_moe.experts.{e}.w3", "stacks.0.layers.0.ffn.up_proj"
        a, b = (np.asarray(parameters[f"{ours}.{x}"])[1, e] for x in ("lora_a", "lora_b"))
        written = settings["lora_alpha"] / 3 * found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"]
        np.testing.assert_allclose(written, scale * (a @ b).T, rtol=1e-5, atol=1e-6)


def test_experts_trained_in_full_are_refused(tmp_path: Path) -> None:
    lora = config.Lora(targets=(config.LoraTarget(modules=("attention.*",), rank=2, alpha=4.0),), train=("ffn.down_proj",))
    with jax.set_mesh(ONE), pytest.raises(ValueError, match=r"ffn.down_proj was trained in full.*--format hf --merge"):
        peft.export_adapter(trained(lora), MIXTRAL, lora, tmp_path / "out", base_model="b")
    assert not list(tmp_path.iterdir())


def test_experts_of_other_families_are_parameters(tmp_path: Path) -> None:
    """Gate and up are one parameter, whose rank is the sum of theirs, and whose product is what each of them adds."""
    lora = lora_of(("ffn.gate_proj", 2, 4.0), ("ffn.up_proj", 3, 1.0), ("ffn.router", 2, 4.0))
    with jax.set_mesh(ONE):
        weights = random_parameters(MISTRAL4, lora=lora)
        peft.export_adapter(weights, MISTRAL4, lora, tmp_path / "out", base_model="b")
    settings = settings_in(tmp_path / "out")
    assert settings["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.gate.weight"]
    assert settings["target_modules"] == ["mlp.gate_proj", "mlp.up_proj"]  # those of the dense first layers
    files = safetensors.numpy.load_file(tmp_path / "out/adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.mlp.experts"
    E = MISTRAL4.ffn.num_experts
    F = MISTRAL4.ffn.ffn_dim
    a_EJI = files[f"{stem}.lora_A.weight"].reshape(E, 5, -1)
    b_OJE = files[f"{stem}.lora_B.weight"].reshape(2 * F, 5, E)
    scale = settings["alpha_pattern"].get("mlp.experts.gate_up_proj", settings["lora_alpha"]) / 5
    delta = scale * np.einsum("oje,eji->eio", b_OJE, a_EJI)
    for part, expected_scale, outputs in (("gate", 2.0, slice(F)), ("up", 1 / 3, slice(F, 2 * F))):
        a, b = (np.asarray(weights[f"stacks.1.layers.0.ffn.{part}_proj.lora_{x}"])[0] for x in "ab")
        np.testing.assert_allclose(delta[..., outputs], expected_scale * (a @ b), rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"vLLM runs mistral4 from Mistral's own files alone"):
        peft.export_adapter(weights, MISTRAL4, lora, tmp_path / "vllm", base_model="b", server="vllm")


def test_latent_attention_and_shared_experts_have_names_of_their_own(tmp_path: Path) -> None:
    """The last name of a shared expert's matrix is that of the dense first layer's, which has no adapter."""
    lora = lora_of(("attention.*", 2, 4.0), ("ffn.shared.*", 3, 6.0))
    with jax.set_mesh(ONE):
        peft.export_adapter(random_parameters(MISTRAL4, lora=lora), MISTRAL4, lora, tmp_path / "out", base_model="b")
    settings = settings_in(tmp_path / "out")
    shared = [f"shared_experts.{part}_proj" for part in ("down", "gate", "up")]
    assert settings["target_modules"] == ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj", *shared]
    assert settings["rank_pattern"] == dict.fromkeys(shared, 3)
    read = peft.read_lora(tmp_path / "out", MISTRAL4)
    assert {target.rank: len(target.modules) for target in read.targets} == {2: 5, 3: 3}
    tensors = safetensors.numpy.load_file(tmp_path / "out/adapter_model.safetensors")
    renamed = {n.replace("shared_experts.up_proj", "experts.0.middle_proj"): x for n, x in tensors.items()}
    safetensors.numpy.save_file(renamed, tmp_path / "out/adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"has .*mlp\.experts\.0\.middle_proj.*, which this model has no place for"):
        peft.read_lora(tmp_path / "out", MISTRAL4)
