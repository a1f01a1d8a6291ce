"""What a server applies of an adapter is what was trained, and each command names files that are there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from moe_train import config
from moe_train.machine.files import read_object
from moe_train.weights import merge, names, peft, serve
from moe_train.weights.hf.config_json import write_model_config
from moe_train.weights.serve import AdapterShape
from tests.random_parameters import random_parameters
from tests.tiny import DEEPSEEK_V3, LORA, MINISTRAL, MIXTRAL, ONE
from tests.weights.mistral.models import MISTRAL4, MODELS

Q, K, UP = "stacks.0.layers.0.attention.q_proj", "stacks.0.layers.0.attention.k_proj", "stacks.0.layers.0.ffn.up_proj"


def test_one_rank_and_the_alpha_of_most_scales() -> None:
    """Scale 2 twice, 0.5 once: the file says 2 for all, and the writer quarters the B of the third."""
    shapes = serve.adapter_shapes("vllm", "mixtral", {Q: AdapterShape(4, 8.0), K: AdapterShape(16, 8.0), UP: AdapterShape(8, 16.0)})
    assert shapes == dict.fromkeys((Q, K, UP), AdapterShape(16, 32.0))
    alike = dict.fromkeys((Q, K), AdapterShape(12, 7.0))
    assert serve.adapter_shapes("vllm", "mixtral", alike) == alike


def as_vllm_reads(directory: Path) -> tuple[dict[str, np.ndarray], int]:
    """What vLLM adds to each weight (out, in), and the rank it makes room for: one r and one alpha for all modules."""
    tensors, settings = safetensors.numpy.load_file(directory / peft.ADAPTER_WEIGHTS), read_object(directory / peft.ADAPTER_CONFIG)
    stems = {name.rpartition(".lora_")[0] for name in tensors}
    scale = settings["lora_alpha"] / (settings["r"] ** 0.5 if settings["use_rslora"] else settings["r"])
    return {stem: scale * (tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]) for stem in stems}, settings["r"]


@pytest.mark.parametrize("rslora", [False, True])
def test_one_scale_gives_the_deltas_of_several(rslora: bool, tmp_path: Path) -> None:
    """Ranks 2 and 3, two scales; experts of ranks of their own."""
    own = config.LoraTarget(modules=("ffn.*_proj",), rank=1, alpha=5.0, experts=(1,))
    rest = LORA.targets[1].model_copy(update={"experts": (0, 2, 3)})
    lora = LORA.model_copy(update={"rslora": rslora, "targets": (LORA.targets[0], own, rest)})
    with jax.set_mesh(ONE):
        parameters = random_parameters(MIXTRAL, lora=lora)
        peft.export_adapter(parameters, MIXTRAL, lora, tmp_path / "out", base_model="base", server="vllm")
        read, rank = as_vllm_reads(tmp_path / "out")
        assert rank == 3 and {
            a.shape[0] for n, a in safetensors.numpy.load_file(tmp_path / "out" / peft.ADAPTER_WEIGHTS).items() if "_A" in n
        } == {3}
        ranks = {path.removesuffix(".lora_a"): 3 for path in parameters if path.endswith(".lora_a")}
        for piece in names.lora_pieces(MIXTRAL, ranks)[::2]:
            weight = next(
                p for p in names.weight_pieces(MIXTRAL) if p.path == piece.path.replace("lora_a", "weight") and p.lead == piece.lead
            )
            wanted = merge.lora_delta(parameters, lora, replace(piece, path=weight.path))
            assert wanted is not None and np.abs(wanted).max() > 0
            np.testing.assert_allclose(read[piece.name.rpartition(".lora_")[0]], weight.to_file(wanted), rtol=1e-4, atol=1e-7)


def test_what_was_trained_in_full_is_refused_where_it_would_be_left_out(tmp_path: Path) -> None:
    lora = LORA.model_copy(update={"train": ("ffn_norm",)})
    with jax.set_mesh(ONE), pytest.raises(ValueError, match=r"vLLM loads only adapters, but .*ffn_norm was trained in full"):
        peft.export_adapter(
            random_parameters(MIXTRAL, lora=lora), MIXTRAL, lora, tmp_path / "out", base_model="base", server="vllm"
        )
    assert not (tmp_path / "out").exists()


def test_transformers_takes_every_shape() -> None:
    shapes = {Q: AdapterShape(4, 8.0), K: AdapterShape(600, 8.0)}
    assert serve.adapter_shapes("transformers", "mixtral", shapes, {UP}) == shapes


def test_what_a_server_cannot_apply_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vLLM loads only adapters, but .*up_proj was trained in full.*--merge"):
        serve.adapter_shapes("vllm", "mixtral", {Q: AdapterShape(4, 8.0)}, {UP})
    with pytest.raises(ValueError, match=r"up to rank 512, this one has rank 513"):
        serve.adapter_shapes("vllm", "mixtral", {Q: AdapterShape(513, 8.0)})
    ends = {"embed": AdapterShape(4, 8.0), "head": AdapterShape(4, 8.0)}
    assert serve.adapter_shapes("vllm", "llama", ends) == serve.adapter_shapes("vllm", "mixtral", ends) == ends
    for family in ("mistral", "ministral", "ministral3"):
        with pytest.raises(ValueError, match=rf"vLLM rejects an adapter of embed in a {family}; .*--merge"):
            serve.adapter_shapes("vllm", family, ends)
    with pytest.raises(ValueError, match=r"does not know the names that --format mistral gives to experts; use --format hf"):
        serve.serving_command("vllm", serve.ServedExport("mistral", MIXTRAL, "out"))
    for server, layout, reads in (("llama.cpp", "hf", "gguf or gguf-lora"), ("transformers", "mistral", "hf or peft")):
        with pytest.raises(ValueError, match=f"does not read --format {layout}; use --format {reads}"):
            serve.serving_command(server, serve.ServedExport(layout, MIXTRAL, "out"))


def test_commands() -> None:
    line = serve.serving_command("vllm", serve.ServedExport("peft", MIXTRAL, "my run/out", base_model="base", rank=17))
    assert line == "vllm serve base --enable-lora --max-lora-rank 32 --lora-modules out='my run/out'"
    assert serve.serving_command("vllm", serve.ServedExport("mistral", MINISTRAL, "out", tokenizer="mistral")).endswith(
        "out --tokenizer-mode mistral --config-format mistral --load-format mistral"
    )
    assert "--tokenizer-mode auto" in serve.serving_command("vllm", serve.ServedExport("mistral", MINISTRAL, "out"))
    assert serve.serving_command("llama.cpp", serve.ServedExport("gguf", MIXTRAL, "out")) == "llama-server -m out/model.gguf"
    assert serve.serving_command("transformers", serve.ServedExport("hf", MIXTRAL, "out")) == "transformers serve out"
    assert serve.serving_command("ollama", serve.ServedExport("gguf", MIXTRAL, "runs/My run")) == (
        "ollama create my-run -f 'runs/My run'/Modelfile && ollama run my-run"
    )


def test_commands_have_the_flags_of_tools() -> None:
    assert serve.tool_parser_of("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]") == "mistral"
    assert serve.tool_parser_of("<tool_call>{{ call | tojson }}</tool_call>") == "hermes"
    assert serve.tool_parser_of("{{ messages }}") is None
    line = serve.serving_command("vllm", serve.ServedExport("hf", MIXTRAL, "out", tool_parser="hermes"))
    assert line == "vllm serve out --enable-auto-tool-choice --tool-call-parser hermes"
    assert serve.serving_command("llama.cpp", serve.ServedExport("gguf", MIXTRAL, "out", tool_parser="mistral")).endswith(
        " --jinja"
    )


def test_a_mistral4_is_served_by_what_knows_it() -> None:
    line = serve.serving_command("transformers", serve.ServedExport("hf", MISTRAL4, "out"))
    assert "AutoModelForImageTextToText as M" in line and "M.from_pretrained('" in line.replace("'\"'\"'", "'")
    with pytest.raises(ValueError, match="vLLM runs mistral4 from Mistral's own files alone"):
        serve.serving_command("vllm", serve.ServedExport("hf", MISTRAL4, "out"))
    assert "--load-format mistral" in serve.serving_command(
        "vllm", serve.ServedExport("mistral", MISTRAL4, "out", tokenizer="mistral")
    )
    assert serve.auto_class_of(DEEPSEEK_V3) == "AutoModelForCausalLM"


def test_vllm_finds_query_scaling_where_it_looks() -> None:
    fields = write_model_config(MODELS["ministral3"], dtype="bfloat16", bos_token_id=1, eos_token_id=2)
    assert fields["llama_4_scaling"] == {"beta": 0.1, "original_max_position_embeddings": 8}
    assert "llama_4_scaling" not in write_model_config(MIXTRAL, dtype="bfloat16", bos_token_id=1, eos_token_id=2)


def test_the_class_that_loads_a_wrapper_is_named() -> None:
    for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
        line = serve.serving_command("transformers", serve.ServedExport("peft", MIXTRAL, "out", base_model="base", auto_class=name))
        assert f"from transformers import {name} as M" in line


def test_mistral4_is_served_by_vllm_from_mistrals_own_files_alone() -> None:
    assert serve.serving_command("vllm", serve.ServedExport("mistral", MISTRAL4, "out", tokenizer="mistral")).startswith(
        "vllm serve out"
    )
    for layout in ("hf", "peft"):
        with pytest.raises(ValueError, match=r"runs mistral4 from Mistral's own files alone; .*--format mistral"):
            serve.serving_command("vllm", serve.ServedExport(layout, MISTRAL4, "out"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="runs mistral4 from Mistral's own files alone"):
        serve.adapter_shapes("vllm", "mistral4", {Q: AdapterShape(4, 8.0)})
    line = serve.serving_command("transformers", serve.ServedExport("peft", MISTRAL4, "out", base_model="base"))
    assert "from transformers import AutoModelForImageTextToText as M" in line
