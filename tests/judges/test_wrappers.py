"""transformers and PEFT as judges of adapters whose base is the text model inside a vision wrapper."""

from __future__ import annotations

import importlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.commands.export import ExportOptions, export
from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.machine.mesh import make_mesh
from moe_train.model import parameters as flat
from moe_train.model import transformer
from moe_train.model.paths import ParameterPath
from moe_train.proof.prove_adapter import AdapterExport, prove_adapter
from moe_train.weights import external, hf, names, peft
from tests.commands.runs import save_run
from tests.judges.test_transformers_and_peft import (
    FAMILIES,
    SIZES,
    YARN,
    assert_same_logits,
    batch,
    load,
    lora_of,
    our_logits,
    random_parameters,
)

pytestmark = pytest.mark.judges

VISION = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 56,
    "patch_size": 14,
    "hidden_act": "silu",
}
AUDIO = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_mel_bins": 8,
    "max_source_positions": 32,
}
WRAPPERS = {"mistral3": ("mistral", "ministral3"), "llava": ("mistral",), "voxtral": ("llama",)}
"""Text models of each class."""
ALL = [(wrapper, text) for wrapper, texts in WRAPPERS.items() for text in texts]
MISTRAL4: dict[str, Any] = {
    "model_type": "mistral4",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 0,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "rope_parameters": YARN | {"rope_theta": 1e4, "mscale": 0.0, "mscale_all_dim": 0.0, "attention_factor": 1.0},
}
PLACEHOLDER = 127
"""The token that stands for an image."""
AUDIO_PLACEHOLDER = 24
"""The token that stands for audio: that of Mistral's tokenizers, since their own layout states none."""
LORAS = {
    "everything": lora_of(("attention.*", 4, 8.0), ("ffn.*", 2, 3.0)),
    "attention": lora_of(("attention.q_proj", 4, 8.0)),
    "both ends": lora_of(("embed", 4, 3.0), ("head", 2, 3.0), ("ffn.up_proj", 3, 4.0)),
    "modules in full": lora_of(("attention.v_proj", 4, 8.0), train=("*_norm", "embed", "head", "attention.q_proj")),
    "modules in full, tied": lora_of(("attention.v_proj", 4, 8.0), train=("final_norm", "embed")),
}
CASES = [
    ("mistral3", "ministral3", "everything"),
    ("mistral3", "ministral3", "modules in full, tied"),
    ("mistral3", "mistral", "attention"),
    ("mistral3", "mistral", "both ends"),
    ("mistral3", "mistral", "modules in full"),
    ("llava", "mistral", "everything"),
    ("llava", "mistral", "modules in full"),
    ("voxtral", "llama", "everything"),
    ("voxtral", "llama", "modules in full, tied"),
]


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return make_mesh(config.Mesh(), jax.devices()[:1])


def wrapper(kind: str, text: str, **more: Any) -> Any:
    """A multimodal model of normal weights around a text model."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fields = MISTRAL4 if text == "mistral4" else SIZES | FAMILIES[text] | more
    tied = fields.get("tie_word_embeddings", False)  # a Voxtral has a head of its own all the same
    text_config = {"model_type": text, **fields}
    match kind:
        case "mistral3":
            settings = transformers.Mistral3Config(
                text_config=text_config, vision_config=VISION, tie_word_embeddings=tied, image_token_index=PLACEHOLDER
            )
        case "llava":
            settings = transformers.LlavaConfig(
                text_config=text_config,
                vision_config=VISION,
                tie_word_embeddings=tied,
                image_token_index=PLACEHOLDER,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
            )
        case "voxtral":
            settings = transformers.VoxtralConfig(text_config=text_config, audio_config=AUDIO, audio_token_id=AUDIO_PLACEHOLDER)
    model = class_of(kind)(settings).eval()
    model.set_attn_implementation("eager")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    if kind == "voxtral":
        sinusoids = importlib.import_module("transformers.models.whisper.modeling_whisper").sinusoids
        table = model.model.audio_tower.embed_positions.weight
        table.data.copy_(sinusoids(*table.shape))
    return model


def class_of(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"{kind.capitalize()}ForConditionalGeneration")


def read_wrapper(kind: str, directory: Path) -> Any:
    return class_of(kind).from_pretrained(directory, dtype="float32", attn_implementation="eager").eval()


def logits_with_inputs(kind: str, model: Any) -> np.ndarray:
    """Logits of a text with an image or audio in it."""
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(3)
    tokens = draw.integers(25, 126, 40)
    number = {"mistral3": 4, "llava": 16, "voxtral": 8}[kind]
    tokens[5 : 5 + number] = AUDIO_PLACEHOLDER if kind == "voxtral" else PLACEHOLDER
    if kind == "voxtral":
        inputs = {"input_features": torch.tensor(draw.normal(size=(1, 8, 64)), dtype=torch.float32)}
    else:
        inputs = {"pixel_values": torch.tensor(draw.normal(size=(1, 3, 56, 56)), dtype=torch.float32)}
        inputs["image_sizes"] = torch.tensor([[56, 56]])
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens)[None], **inputs).logits.numpy()


@pytest.mark.parametrize(("kind", "text"), [*ALL, ("mistral3", "mistral4")])
def test_logits_with_an_image_survive_every_layout(kind: str, text: str, tmp_path: Path) -> None:
    """An export without training keeps every bit, in Hugging Face's layout and through Mistral's own."""
    judge = wrapper(kind, text, vocab_size=300)
    judge.save_pretrained(tmp_path / "base")
    train_tokenizer(["some text to learn from"] * 5, 270, tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").iterdir():
        shutil.copyfile(file, tmp_path / "base" / file.name)
    before = logits_with_inputs(kind, read_wrapper(kind, tmp_path / "base"))
    assert np.array_equal(before, logits_with_inputs(kind, judge)), "transformers does not read what it wrote"
    tensors = ExportOptions(depth="tensors")
    export(tmp_path / "base", tmp_path / "hf", options=tensors)
    assert np.array_equal(logits_with_inputs(kind, read_wrapper(kind, tmp_path / "hf")), before)
    export(tmp_path / "base", tmp_path / "native", "mistral", options=tensors)
    export(tmp_path / "native", tmp_path / "again", options=tensors)
    after = logits_with_inputs(kind, read_wrapper(kind, tmp_path / "again"))
    if kind == "voxtral":  # its positions are computed anew, where transformers computes them in float32
        assert np.abs(after - before).max() / np.abs(before).max() < 1e-5
    else:
        assert np.array_equal(after, before)
    if text == "mistral4":  # its experts are one tensor in files, of which FP8 is refused
        return
    export(tmp_path / "base", tmp_path / "fp8", options=ExportOptions(depth="tensors", dtype="fp8"))
    quantized = class_of(kind).from_pretrained(tmp_path / "fp8", dtype="bfloat16", attn_implementation="eager").float().eval()
    tower_name = "audio_tower" if kind == "voxtral" else "vision_tower"
    tower = dict(judge.model.get_submodule(tower_name).named_parameters())
    carried = quantized.model.get_submodule(tower_name).named_parameters()
    assert all((tower[name].bfloat16() == x.bfloat16()).all() for name, x in carried)
    assert 0 < np.abs(logits_with_inputs(kind, quantized) - before).max() / np.abs(before).max() < 0.5
    judge.model.get_submodule("multi_modal_projector.linear_2").weight.data.mul_(2)
    assert not np.allclose(logits_with_inputs(kind, judge), before)  # the image matters


def trained_on(base: Path, lora: config.Lora) -> tuple[config.Model, Any, dict[str, jax.Array]]:
    """The model of a base with random adapters, on the mesh in force."""
    model, _, weights = load(base)
    structure, random = random_parameters(model, lora)
    return model, structure, weights | {path: x for path, x in random.items() if ParameterPath.parse(path).is_trained(lora)}


@pytest.mark.parametrize(("kind", "text", "adapters"), CASES)
def test_an_adapter_of_a_wrapper_works_in_peft(
    kind: str, text: str, adapters: str, mesh: jax.sharding.Mesh, tmp_path: Path
) -> None:
    PeftModel = pytest.importorskip("peft").PeftModel
    base = tmp_path / "base"
    wrapper(kind, text).save_pretrained(base)
    assert hf.is_wrapper(base)
    lora = LORAS[adapters]
    with jax.set_mesh(mesh):
        model, structure, parameters = trained_on(base, lora)
        tokens, arrays = batch(mesh)
        tokens = np.minimum(tokens, 126)  # 127 stands for an image
        arrays = (tokens, *arrays[1:])
        ours = our_logits(structure, parameters, arrays)
        for name, layout in (("adapter", names.WRAPPED), ("wrong", names.HUGGING_FACE)):
            peft.export_adapter(parameters, model, lora, tmp_path / name, base_model=str(base), layout=layout)
        record = prove_adapter(AdapterExport(tmp_path / "adapter", "peft", parameters, model, lora, None, None, base=base))
        assert record["in_wrapper"] and {c["name"]: c["passed"] for c in record["checks"]}["names"]
        with pytest.raises(RuntimeError, match="the proof failed"):
            prove_adapter(AdapterExport(tmp_path / "wrong", "peft", parameters, model, lora, None, None, base=base))
    judge = PeftModel.from_pretrained(read_wrapper(kind, base), tmp_path / "adapter").eval()
    assert not [name for name, _ in judge.named_parameters() if "_tower" in name and ("lora_" in name or "modules_to_save" in name)]
    assert_same_logits(judge, ours, tokens)
    assert_same_logits(judge.merge_and_unload(), ours, tokens)
    with pytest.raises(AssertionError):
        assert_same_logits(read_wrapper(kind, base), ours, tokens)  # the adapter matters


WRITTEN_BY_PEFT: dict[str, dict[str, Any]] = {
    "a regular expression": {"target_modules": r".*language_model.*\.(q_proj|down_proj)", "use_rslora": True},
    "ends of names": {
        "target_modules": ["self_attn.v_proj", "mlp.up_proj", "self_attn.k_proj"],
        "rank_pattern": {"v_proj": 6},
    },
    "whole weights": {"target_modules": ["self_attn.q_proj"], "modules_to_save": ["language_model.norm"], "bias": "all"},
    "patterns of whole names": {
        "target_modules": ["self_attn.o_proj", "mlp.gate_proj"],
        "alpha_pattern": {r"model\.language_model\.layers\.\d+\.mlp\.gate_proj": 3},
    },
}


ADAPTING_THE_TOWER = {("voxtral", "ends of names"), ("llava", "whole weights"), ("voxtral", "whole weights")}
"""Where a tower has modules with these ends of names too, or biases."""


@pytest.mark.parametrize(("kind", "text"), ALL)
@pytest.mark.parametrize("settings", WRITTEN_BY_PEFT)
def test_an_adapter_that_peft_wrote_on_a_wrapper_is_read(
    kind: str, text: str, settings: str, mesh: jax.sharding.Mesh, tmp_path: Path
) -> None:
    judges, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    judge = wrapper(kind, text)
    judge.save_pretrained(tmp_path / "base")
    fields = WRITTEN_BY_PEFT[settings]
    judge = judges.get_peft_model(judge, judges.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **fields)).eval()
    torch.manual_seed(1)
    for parameter in judge.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2)
    judge.save_pretrained(tmp_path / "adapter")
    if (kind, settings) in ADAPTING_THE_TOWER:
        with pytest.raises(ValueError, match=r"adapt the tower or projector.*merge_and_unload"):
            peft.read_lora(tmp_path / "adapter", external.read_external_model(tmp_path / "base"))
        return
    with jax.set_mesh(mesh):
        model, _, base = load(tmp_path / "base")
        lora = peft.read_lora(tmp_path / "adapter", model)
        structure, shapes = flat.parameters(transformer.abstract_model(model, config.Compute(), lora))
        wanted = {path: like for path, like in shapes.items() if ParameterPath.parse(path).is_trained(lora)}
        tokens, arrays = batch(mesh)
        tokens = np.minimum(tokens, 126)
        ours = our_logits(structure, base | peft.load_adapter(tmp_path / "adapter", model, wanted), (tokens, *arrays[1:]))
    assert_same_logits(judge, ours, tokens)


def test_an_adapter_that_also_adapts_the_tower_is_refused(tmp_path: Path) -> None:
    judges = pytest.importorskip("peft")
    judge = wrapper("mistral3", "mistral")
    judge.save_pretrained(tmp_path / "base")
    judge = judges.get_peft_model(judge, judges.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    judge.save_pretrained(tmp_path / "adapter")
    model = external.read_external_model(tmp_path / "base")
    with pytest.raises(ValueError, match=r"adapt the tower or projector.*merge_and_unload"):
        peft.read_lora(tmp_path / "adapter", model)


@pytest.mark.parametrize(("kind", "text"), [("mistral3", "mistral"), ("voxtral", "llama")])
def test_the_printed_command_runs_on_a_wrapper(kind: str, text: str, mesh: jax.sharding.Mesh, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    tokenizer = train_tokenizer(["some text to learn from"] * 5, 270, tmp_path / "tokenizer")
    wrapper(kind, text, vocab_size=300).save_pretrained(tmp_path / "base")
    lora = LORAS["everything"]
    with jax.set_mesh(mesh):
        model, _, parameters = trained_on(tmp_path / "base", lora)
        sections = {"model": model, "mesh": config.Mesh(), "loss": config.Loss(), "lora": lora}
        save_run(tmp_path / "run", parameters, tokenizer, init_from=str(tmp_path / "base"), **sections)
    record = export(tmp_path / "run", tmp_path / "out", "peft", options=ExportOptions(server="transformers"))
    program, *arguments = shlex.split(record["serve"])
    assert program == "python"
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0 and result.stdout.strip(), result.stderr
    assert "missing adapter keys" not in result.stderr
