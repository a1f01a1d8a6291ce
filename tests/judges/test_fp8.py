"""transformers as the judge of FP8 files: its dequantization bit for bit, and the logits of what it and this package read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.machine.mesh import make_mesh
from moe_train.weights import external, names
from tests.judges.test_transformers_and_peft import (
    assert_same_logits,
    batch,
    load,
    our_logits,
    random_judge,
    random_parameters,
    settings_of,
)
from tests.judges.test_wrappers import wrapper
from tests.weights.fp8.files import BF16, HF_BLOCK, HF_TENSOR, Arrays, quantize, quantize_folder, save
from tests.weights.fp8.files import load as load_arrays

pytestmark = pytest.mark.judges

BLOCKS = HF_BLOCK | {"weight_block_size": [8, 4]}


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return make_mesh(config.Mesh(), jax.devices()[:1])


def inverse(name: str) -> str:
    return f"{name}_scale_inv"


def dequantized_by_transformers(folder: Path, auto_class: str = "AutoModelForCausalLM") -> Any:
    """The model as transformers dequantizes it to bfloat16, then computed in float32."""
    transformers = pytest.importorskip("transformers")
    judge, found = getattr(transformers, auto_class).from_pretrained(
        folder, dtype="bfloat16", attn_implementation="eager", output_loading_info=True
    )
    assert not found["missing_keys"] and not found["mismatched_keys"], found
    return judge.float().eval()


@pytest.mark.parametrize("family", ["mixtral", "mistral"])
@pytest.mark.parametrize(("section", "steps"), [(HF_TENSOR, None), (BLOCKS, (8, 4))], ids=["tensor", "blocks"])
def test_transformers_dequantizes_to_the_same_bits(
    family: str, section: dict[str, Any], steps: tuple[int, int] | None, mesh: jax.sharding.Mesh, tmp_path: Path
) -> None:
    random_judge(family).bfloat16().save_pretrained(tmp_path / "base")
    activation = "activation_scale" if steps is None else None
    folder, _ = quantize_folder(tmp_path / "base", tmp_path / "q", section, inverse, steps, activation)
    judge = dequantized_by_transformers(folder)
    state = judge.state_dict()
    weights = external.open_external_weights(folder)
    fused = {(piece.path, piece.lead): piece for piece in names.weight_pieces(weights.model, names.hugging_face(experts="fused"))}
    assert {piece.name for piece in fused.values()} == set(state)
    for piece in weights.pieces:
        in_memory = fused[piece.path, piece.lead]
        theirs = state[in_memory.name].numpy()[tuple(i if isinstance(i, int) else slice(*i) for i in in_memory.part)]
        np.testing.assert_array_equal(weights.tensors[piece.name].read().astype(np.float32), theirs)
    with jax.set_mesh(mesh):
        _, structure, parameters = load(folder)
        tokens, arrays = batch(mesh)
        assert_same_logits(judge, our_logits(structure, parameters, arrays), tokens)


FUSED: dict[str, tuple[Callable[[tuple[int, ...]], tuple[int, ...]], dict[str, Any]]] = {
    "an expert": (lambda shape: (1, *shape[1:]), HF_TENSOR),
    "half an expert": (lambda shape: (1, shape[1] // 2, shape[2]), HF_TENSOR),
    "blocks": (lambda shape: (1, 8, 4), BLOCKS),
}


@pytest.mark.parametrize("kind", FUSED)
def test_fused_experts_have_the_bits_of_the_formula_in_transformers(kind: str, tmp_path: Path) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    torch = pytest.importorskip("torch")
    block, section = FUSED[kind]
    random_judge("mixtral").bfloat16().save_pretrained(tmp_path / "base")
    (tmp_path / "q").mkdir()
    arrays: Arrays = {}
    for name, w in fused_layout(load_arrays(tmp_path / "base/model.safetensors")).items():
        if "mlp.experts" not in name:
            arrays[name] = w
            continue
        steps = block(w.shape) if "gate_up" in name or kind == "blocks" else (1, *w.shape[1:])
        arrays[name], arrays[inverse(name)] = quantize(w, steps)
    save(arrays, tmp_path / "q/model.safetensors")
    settings = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "q/config.json").write_text(json.dumps(settings | {"quantization_config": section}))
    weights = external.open_external_weights(tmp_path / "q")
    quantized = [name for name in weights.tensors if "mlp.experts" in name]
    assert len(quantized) == 4
    for name in quantized:
        codes = torch.tensor(arrays[name].view(np.uint8)).view(torch.float8_e4m3fn)
        scales = torch.tensor(arrays[inverse(name)])
        theirs = fp8.Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(weights.tensors[name].read().astype(np.float32), theirs)
        np.testing.assert_array_equal(weights.tensors[name].read((1, slice(3, 17))).astype(np.float32), theirs[1, 3:17])


def fused_layout(arrays: Arrays) -> Arrays:
    """Return a Mixtral of separate experts with fused ones, as transformers 5 names them in memory."""
    fused: Arrays = {name.replace("block_sparse_moe.gate", "mlp.gate"): w for name, w in arrays.items() if ".experts." not in name}
    for layer in range(2):
        experts = f"model.layers.{layer}.block_sparse_moe.experts"
        w1, w2, w3 = (np.stack([arrays[f"{experts}.{e}.w{i}.weight"] for e in range(4)]) for i in (1, 2, 3))
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    return fused


def test_a_wrapper_states_the_quantization_of_its_text_model(mesh: jax.sharding.Mesh, tmp_path: Path) -> None:
    wrapper("mistral3", "ministral3").bfloat16().save_pretrained(tmp_path / "base")
    section = HF_TENSOR | {"modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"]}
    arrays = load_arrays(tmp_path / "base/model.safetensors")
    folder = tmp_path / "q"
    folder.mkdir()
    written: Arrays = {}
    for name, w in arrays.items():
        written[name] = w
        if "language_model" in name and "layers." in name and "norm" not in name:
            written[name], written[inverse(name)] = quantize(w, w.shape)
            written[inverse(name)] = written[inverse(name)].astype(BF16).reshape(())
            written[name.replace("weight", "activation_scale")] = np.ones((), BF16)
    save(written, folder / "model.safetensors")
    settings = json.loads((tmp_path / "base/config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": section}))
    judge = dequantized_by_transformers(folder, "AutoModelForImageTextToText")
    with jax.set_mesh(mesh):
        _, structure, parameters = load(folder)
        tokens, arrays = batch(mesh)
        tokens = np.minimum(tokens, 126)  # 127 stands for an image
        assert_same_logits(judge, our_logits(structure, parameters, (tokens, *arrays[1:])), tokens)


WIDE_SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("family", "sizes"), [("mixtral", {}), ("ministral3", {}), ("mixtral", WIDE_SIZES)], ids=["tensors", "tied", "blocks"]
)
def test_transformers_reads_our_fp8_exports(family: str, sizes: dict[str, Any], mesh: jax.sharding.Mesh, tmp_path: Path) -> None:
    """Its logits are those of the values that the files stand for, and its tensors have their bits."""
    settings = settings_of(family)
    settings.update(sizes)
    settings.architectures = [f"{settings.model_type.capitalize()}ForCausalLM"]
    settings.save_pretrained(tmp_path)
    model = external.read_external_model(tmp_path)
    with jax.set_mesh(mesh):
        _, weights = random_parameters(model)
        options = write_and_prove.WriteOptions(dtype="fp8", max_shard_bytes=40_000, depth="tensors")
        write_and_prove.export_model(weights, model, tmp_path / "q", options)
        _, structure, parameters = load(tmp_path / "q")
        tokens, arrays = batch(mesh)
        ours = our_logits(structure, parameters, arrays)
    section = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]
    assert section["weight_block_size"] == ([128, 128] if sizes else None)
    judge = dequantized_by_transformers(tmp_path / "q")
    assert_same_logits(judge, ours, tokens)
    assert converted_by_transformers(settings, section) == {
        name.removesuffix(".weight").replace("block_sparse_moe", "mlp").split(".experts.")[0]
        + (".experts" if "experts" in name else "")
        for name in on_disk_names(tmp_path / "q")
        if name + "_scale_inv" in on_disk_names(tmp_path / "q")
    }


LATENT_SIZES: dict[str, Any] = {
    **{"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 128},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    **{"q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64},
    **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "max_position_embeddings": 128},
}
"""Blocks divide every matrix but `kv_a_proj_with_mqa`."""


@pytest.mark.slow
def test_deepseek_v3_is_written_in_blocks(mesh: jax.sharding.Mesh, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.DeepseekV3Config(**LATENT_SIZES, num_mtp_layers=0, architectures=["DeepseekV3ForCausalLM"])
    settings.save_pretrained(tmp_path)
    ours, section, tokens = export_random(tmp_path, mesh)
    assert section["weight_block_size"] == [128, 128]
    judge = dequantized_by_transformers(tmp_path / "q")
    assert_same_logits(judge, ours, tokens)
    quantized = {name.removesuffix(".weight_scale_inv") for name in on_disk_names(tmp_path / "q") if name.endswith("scale_inv")}
    modules = {name.split(".experts.")[0] + (".experts" if ".experts." in name else "") for name in quantized}
    assert converted_by_transformers(settings, section) == modules
    assert not any("_a_proj" in name for name in modules) and "model.layers.1.mlp.experts" in modules


@pytest.mark.parametrize(
    "sizes", [{}, {"moe_intermediate_size": 48, "q_lora_rank": 24, "v_head_dim": 40}], ids=["blocks", "tensors"]
)
def test_fused_experts_of_mistral4_are_read_as_transformers_keeps_them(
    sizes: dict[str, Any], mesh: jax.sharding.Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers knows FP8 experts on GPUs alone, where it keeps codes and scales: these are ours, and so are the logits."""
    transformers = pytest.importorskip("transformers")
    quantizer = pytest.importorskip("transformers.quantizers.quantizer_finegrained_fp8").FineGrainedFP8HfQuantizer
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    settings = transformers.Mistral4Config(**LATENT_SIZES | sizes, architectures=["Mistral4ForCausalLM"])
    settings.save_pretrained(tmp_path)
    ours, section, tokens = export_random(tmp_path, mesh)
    assert section["weight_block_size"] == (None if sizes else [128, 128])
    # Without this, a machine without a GPU dequantizes, and drops the scales of fused experts.
    monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
    # The kernel runs on GPUs alone: in its place, the values that codes and scales stand for.
    monkeypatch.setattr(fp8, "fp8_linear", dequantized_linear)
    judge, info = transformers.Mistral4ForCausalLM.from_pretrained(
        tmp_path / "q", dtype="float32", attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    weights = external.open_external_weights(tmp_path / "q")
    dequantize = fp8.Fp8Dequantize(None)._dequantize_one
    experts = {name: p for name, p in judge.named_parameters() if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    for name, codes in experts.items():
        scales = judge.get_parameter(inverse(name))
        theirs = dequantize(codes.data, scales.data, pytest.importorskip("torch").bfloat16).float().numpy()
        np.testing.assert_array_equal(weights.tensors[name].read().astype(np.float32), theirs)
    assert len(experts) == 2
    assert_same_logits(judge.eval(), ours, tokens)


def dequantized_linear(
    input: Any, weight: Any, scales: Any, block_size: Any, bias: Any = None, activation_scale: Any = None, allow: bool = True
) -> Any:
    """Stand in for the kernel: multiply by the dequantized weight."""
    torch = pytest.importorskip("torch")
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    assert bias is None and activation_scale is None
    w = fp8.Fp8Dequantize(None)._dequantize_one(weight, scales, torch.bfloat16).float()
    return torch.nn.functional.linear(input, w)


def export_random(folder: Path, mesh: jax.sharding.Mesh) -> tuple[Any, dict[str, Any], Any]:
    """Export a random model of the config in a folder as FP8 to `q`; returns our logits, what config.json states, and tokens."""
    model = external.read_external_model(folder)
    with jax.set_mesh(mesh):
        _, weights = random_parameters(model)
        options = write_and_prove.WriteOptions(dtype="fp8", max_shard_bytes=400_000, depth="tensors")
        write_and_prove.export_model(weights, model, folder / "q", options)
        _, structure, parameters = load(folder / "q")
        tokens, arrays = batch(mesh)
        ours = our_logits(structure, parameters, arrays)
    return ours, json.loads((folder / "q/config.json").read_text())["quantization_config"], tokens


def on_disk_names(folder: Path) -> set[str]:
    """Names of the tensors of an export."""
    return set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])


def converted_by_transformers(settings: Any, section: dict[str, Any]) -> set[str]:
    """The modules for which transformers expects FP8 weights, in a model that it does not dequantize."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_config(settings)
    quantization = transformers.FineGrainedFP8Config.from_dict(section)
    fp8.replace_with_fp8_linear(model, quantization.modules_to_not_convert, quantization, pre_quantized=True)
    return {name for name, module in model.named_modules() if isinstance(module, fp8.FP8Linear | fp8.FP8Experts)}
