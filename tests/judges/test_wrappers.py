"""transformers and PEFT as judges of adapters whose base is the text model inside a vision wrapper."""

from __future__ import annotations

import shlex
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
TEXTS = ("ministral3", "mistral")
LORAS = {
    "everything": lora_of(("attention.*", 4, 8.0), ("ffn.*", 2, 3.0)),
    "attention": lora_of(("attention.q_proj", 4, 8.0)),
    "both ends": lora_of(("embed", 4, 3.0), ("head", 2, 3.0), ("ffn.up_proj", 3, 4.0)),
    "modules in full": lora_of(("attention.v_proj", 4, 8.0), train=("*_norm", "embed", "head", "attention.q_proj")),
    "modules in full, tied": lora_of(("attention.v_proj", 4, 8.0), train=("final_norm", "embed")),
}
CASES = [
    ("ministral3", "everything"),
    ("ministral3", "modules in full, tied"),
    ("mistral", "attention"),
    ("mistral", "both ends"),
    ("mistral", "modules in full"),
]


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return make_mesh(config.Mesh(), jax.devices()[:1])


def wrapper(text: str, **more: Any) -> Any:
    """A vision model of normal weights around a text model."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fields = SIZES | FAMILIES[text] | more
    tied = fields.pop("tie_word_embeddings", False)
    settings = transformers.Mistral3Config(
        text_config={"model_type": text, **fields}, vision_config=VISION, tie_word_embeddings=tied, image_token_index=127
    )
    model = transformers.AutoModelForImageTextToText.from_config(settings, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model


def read_wrapper(directory: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype="float32", attn_implementation="eager").eval()


def trained_on(base: Path, lora: config.Lora) -> tuple[config.Model, Any, dict[str, jax.Array]]:
    """The model of a base with random adapters, on the mesh in force."""
    model, _, weights = load(base)
    structure, random = random_parameters(model, lora)
    return model, structure, weights | {path: x for path, x in random.items() if ParameterPath.parse(path).is_trained(lora)}


@pytest.mark.parametrize(("text", "adapters"), CASES)
def test_an_adapter_of_a_wrapper_works_in_peft(text: str, adapters: str, mesh: jax.sharding.Mesh, tmp_path: Path) -> None:
    PeftModel = pytest.importorskip("peft").PeftModel
    base = tmp_path / "base"
    wrapper(text).save_pretrained(base)
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
    judge = PeftModel.from_pretrained(read_wrapper(base), tmp_path / "adapter").eval()
    assert not [name for name, _ in judge.named_parameters() if "vision_tower" in name and "lora_" in name]
    assert_same_logits(judge, ours, tokens)
    assert_same_logits(judge.merge_and_unload(), ours, tokens)
    with pytest.raises(AssertionError):
        assert_same_logits(read_wrapper(base), ours, tokens)  # the adapter matters


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


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("settings", WRITTEN_BY_PEFT)
def test_an_adapter_that_peft_wrote_on_a_wrapper_is_read(text: str, settings: str, mesh: jax.sharding.Mesh, tmp_path: Path) -> None:
    judges, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    judge = wrapper(text)
    judge.save_pretrained(tmp_path / "base")
    fields = WRITTEN_BY_PEFT[settings]
    judge = judges.get_peft_model(judge, judges.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **fields)).eval()
    torch.manual_seed(1)
    for parameter in judge.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2)
    judge.save_pretrained(tmp_path / "adapter")
    with jax.set_mesh(mesh):
        model, _, base = load(tmp_path / "base")
        lora = peft.read_lora(tmp_path / "adapter", model)
        structure, shapes = flat.parameters(jax.eval_shape(lambda: transformer.init_model(0, model, config.Compute(), lora)))
        wanted = {path: like for path, like in shapes.items() if ParameterPath.parse(path).is_trained(lora)}
        tokens, arrays = batch(mesh)
        tokens = np.minimum(tokens, 126)
        ours = our_logits(structure, base | peft.load_adapter(tmp_path / "adapter", model, wanted), (tokens, *arrays[1:]))
    assert_same_logits(judge, ours, tokens)


def test_an_adapter_that_also_adapts_the_tower_is_refused(tmp_path: Path) -> None:
    judges = pytest.importorskip("peft")
    judge = wrapper("mistral")
    judge.save_pretrained(tmp_path / "base")
    judge = judges.get_peft_model(judge, judges.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    judge.save_pretrained(tmp_path / "adapter")
    model = external.read_external_model(tmp_path / "base")
    with pytest.raises(ValueError, match=r"adapt the vision tower or projector.*merge_and_unload"):
        peft.read_lora(tmp_path / "adapter", model)


def test_the_printed_command_runs_on_a_wrapper(mesh: jax.sharding.Mesh, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    tokenizer = train_tokenizer(["some text to learn from"] * 5, 270, tmp_path / "tokenizer")
    wrapper("mistral", vocab_size=300).save_pretrained(tmp_path / "base")
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
