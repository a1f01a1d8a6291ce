"""mistral.rs as the judge, a server in Rust with weights and layers of its own: models as safetensors and as GGUF, and
adapters, those of routed experts too, beside the base that it has loaded. Comes with the extra `judges` on Linux x86-64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.data.chat.conversation_to_tokens import render_prompt
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.machine.mesh import make_mesh
from moe_train.weights import peft
from moe_train.weights.texts import Texts
from tests.judges.test_llama_cpp import DENSE, MOE, SIZES, our_logits, random_parameters

pytestmark = pytest.mark.judges

ATTENTION = config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=16)  # it takes head_dim for model_dim / num_heads
MODELS = {
    "mixtral": config.Model(family="mixtral", attention=ATTENTION, ffn=MOE, **SIZES),
    "mistral": config.Model(family="mistral", attention=ATTENTION, ffn=DENSE, **SIZES),
    "llama": config.Model(family="llama", attention=ATTENTION, ffn=DENSE, tie_embeddings=True, **SIZES),
}
PROMPT = [{"role": "user", "content": "def judge(model): return"}]  # rendered by its own jinja
ADAPTER = config.Lora(
    targets=(
        config.LoraTarget(modules=("attention.*",), rank=4, alpha=8.0),
        config.LoraTarget(modules=("ffn.gate_proj", "ffn.up_proj", "ffn.down_proj"), rank=2, alpha=6.0),
    )
)


@pytest.fixture(scope="module")
def judge() -> Any:
    mistralrs = pytest.importorskip("mistralrs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MISTRALRS_CPU_KV_F32", "1")  # its cache is float16 otherwise
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("RAYON_NUM_THREADS", "1")
        yield mistralrs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    return train_tokenizer([Path(__file__).read_text()], 330, tmp_path_factory.mktemp("bpe") / "tokenizer")


@pytest.fixture(scope="module", autouse=True)
def mesh() -> Any:
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


def architecture(judge: Any, model: config.Model) -> Any:
    return getattr(judge.Architecture, model.family.capitalize())


def answer(judge: Any, which: Any, adapter: str | None = None) -> list[dict[int, float]]:
    """Logarithms of the likeliest tokens' probabilities, of each place that it continues PROMPT at; the chosen one first."""
    runner = judge.Runner(which, no_paged_attn=True, prefix_cache_n=0, token_source="none")
    options: dict[str, Any] = {"model": "default", "max_tokens": 6, "temperature": 0.0, "logprobs": True, "top_logprobs": 5}
    said = runner.send_chat_completion_request(judge.ChatCompletionRequest(messages=PROMPT, adapter=adapter, **options))
    return [{top.token: top.logprob for top in place.top_logprobs} for place in said.choices[0].logprobs.content]


def assert_ours(told: list[dict[int, float]], structure: Any, parameters: dict[str, jax.Array], tokenizer: HuggingFace) -> None:
    assert len(told) > 1
    start = render_prompt(PROMPT, tokenizer.chat_template, tokenizer)
    chosen = [max(place, key=lambda token: place[token]) for place in told]
    logits = our_logits(structure, parameters, start + chosen[:-1])[len(start) - 1 :]
    for ours, theirs in zip(np.asarray(jax.nn.log_softmax(logits)), told, strict=True):
        assert set(theirs) == set(np.argsort(ours)[-len(theirs) :].tolist())
        np.testing.assert_allclose([ours[token] for token in theirs], list(theirs.values()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "layout"), [("mixtral", "hf"), ("mixtral", "gguf"), ("mistral", "hf"), ("llama", "hf")])
def test_a_model_answers_as_ours(judge: Any, name: str, layout: Any, tokenizer: HuggingFace, tmp_path: Path) -> None:
    model = MODELS[name]
    structure, parameters = random_parameters(model)
    texts = Texts(tokenizer, tokenizer.chat_template)
    write_and_prove.export_model(
        parameters,
        model,
        tmp_path / "out",
        write_and_prove.WriteOptions(layout=layout, dtype="float32" if layout == "hf" else "f32", texts=texts, depth="tensors"),
    )
    if layout == "hf":
        which = judge.Which.Plain(str(tmp_path / "out"), arch=architecture(judge, model), dtype=judge.ModelDType.F32)
    else:
        which = judge.Which.GGUF(str(tmp_path / "out"), "model.gguf", dtype=judge.ModelDType.F32)
    assert_ours(answer(judge, which), structure, parameters, tokenizer)


@pytest.mark.parametrize("name", ["mixtral", "mistral"])
def test_an_adapter_beside_its_base_answers_as_ours(judge: Any, name: str, tokenizer: HuggingFace, tmp_path: Path) -> None:
    model = MODELS[name]
    structure, parameters = random_parameters(model, ADAPTER)
    base = {path: array for path, array in parameters.items() if not path.endswith((".lora_a", ".lora_b"))}
    texts = Texts(tokenizer, tokenizer.chat_template)
    write_and_prove.export_model(
        base, model, tmp_path / "base", write_and_prove.WriteOptions(layout="hf", dtype="float32", texts=texts, depth="tensors")
    )
    peft.export_adapter(parameters, model, ADAPTER, tmp_path / "adapter", base_model="base")
    which = judge.Which.Lora(
        str(tmp_path / "base"),
        adapters=[judge.LoraAdapter("trained", str(tmp_path / "adapter"))],
        arch=architecture(judge, model),
        dtype=judge.ModelDType.F32,
    )
    with_it, without = answer(judge, which, "trained"), answer(judge, which)
    assert with_it != without
    assert_ours(with_it, structure, parameters, tokenizer)
