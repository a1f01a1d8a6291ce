"""Files by the command line alone, as somebody would: train beside a base, export in every form, verify, evaluate, go on."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from moe_train import config
from moe_train.cli import main
from moe_train.commands import write_and_prove
from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import parameters
from moe_train.model.transformer import init_model
from moe_train.weights.texts import Texts

pytestmark = pytest.mark.slow

MODEL = config.Model(
    family="mixtral",
    vocab_size=288,
    model_dim=32,
    num_layers=2,
    attention=config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8),
    ffn=config.MoeFfn(name="moe", ffn_dim=32, num_experts=4, experts_per_token=2),
    max_seq_len=64,
    init_stddev=0.1,
)
RUN = """\
name: end_to_end
run_dir: run
init_from: base
lora: {targets: [{modules: ["attention.*", "ffn.*_proj"], rank: 2, alpha: 8}]}
data:
  train: [{name: files, files: [train.jsonl], record: {name: chat}}]
  eval: [{name: files, files: [eval.jsonl], record: {name: chat}}]
  cache_dir: cache
train: {steps: 3, batch_size: 8, seq_len: 64}
optimizer: {name: adamw, learning_rate: 3e-2}
loss: {load_balance_loss_coef: 0, router_z_loss_coef: 0}
mesh: {fsdp: 2, expert: 2, tensor: 2}
evaluation: {every_steps: 3}
metrics: {tensorboard: false}
"""
WHOLE = {
    # format, dtype -> by how much the held-out loss may differ from the run's
    **{("hf", "float32"): 1e-5, ("hf", "bfloat16"): 1e-2, ("mistral", "float32"): 1e-5},
    **{("gguf", "f32"): 1e-5, ("gguf", "f16"): 2e-3, ("gguf", "bf16"): 1e-2, ("gguf", "q8_0"): 1e-2},
}
ADAPTERS = ("peft", "mistral-lora", "gguf-lora")
MODELFILE = (
    r'FROM \./model\.gguf\nTEMPLATE """\{\{ \$first := true \}\}.*\[INST\].*"""\nPARAMETER stop "</s>"\nPARAMETER stop "\[INST\]"\n'
)

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """`moe-train` in a folder with a base, data and a run; returns what it printed as JSON, if anything."""
    folder = tmp_path_factory.mktemp("end_to_end")
    there = Path.cwd()
    os.chdir(folder)
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    if before[0] is None:
        jax.config.update("jax_compilation_cache_dir", str(folder / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    for name, count in (("train", 80), ("eval", 40)):
        turns = (
            [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": f"{i} is a number"}]
            for i in range(count)
        )
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    tokenizer = train_tokenizer(["what is a number? 1 2 3"] * 5, 270, folder / "tokenizer")
    with jax.set_mesh(make_mesh(config.Mesh(fsdp=8))):
        weights = parameters(jax.jit(lambda: init_model(0, MODEL, config.Compute()))())[1]
        texts = Texts(tokenizer, tokenizer.chat_template)
        write_and_prove.export_model(
            weights, MODEL, folder / "base", write_and_prove.WriteOptions(dtype="float32", texts=texts, depth="tensors")
        )
    Path("run.yaml").write_text(RUN)

    def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main.main(arguments)
        out, err = capsys.readouterr()
        assert int(stop.value.code or 0) == code, err
        return json.loads(out) if "--json" in arguments else out

    yield run
    os.chdir(there)
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


@pytest.fixture
def losses(command: Command, capsys: pytest.CaptureFixture[str]) -> list[float]:
    """Held-out loss of the run before and after its steps."""
    if not Path("run").exists():
        command(capsys, "train", "run.yaml")
    return of_run("run")


def of_run(directory: str) -> list[float]:
    lines = [json.loads(line) for line in Path(directory, "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "eval"]


@pytest.mark.parametrize(("layout", "dtype"), WHOLE)
def test_a_merged_model_in_every_layout(
    layout: str, dtype: str, command: Command, losses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"{layout}-{dtype}"
    depth = "full" if (layout, dtype) in (("gguf", "q8_0"), ("hf", "bfloat16")) else "tensors"
    made = command(capsys, *("export", "run", out, "--format", layout, "--dtype", dtype, "--merge", "--proof", depth, "--json"))
    passed = {check["name"]: check["passed"] for check in made["checks"]}
    assert passed["tensors"] and passed["merge"] and passed["template"] and passed["answers"] is (depth == "full" or None)
    for more in ((), ("--run", "run"), ("--base", "base"), ("--base", "base", "--adapter", "run")):
        checks = {check["name"]: check for check in command(capsys, "verify", out, "--json", "--proof", "tensors", *more)["checks"]}
        assert checks["merge"]["passed"] is (True if more else None), checks["merge"]
    found = command(capsys, "evaluate", out, "--data", "eval.jsonl", "--json")
    assert abs(losses[-1] - losses[0]) > 0.05 and abs(found["loss"] - losses[-1]) < WHOLE[layout, dtype]
    if layout == "gguf":
        assert re.fullmatch(MODELFILE, Path(out, "Modelfile").read_text())
    if (layout, dtype) in (("mistral", "float32"), ("gguf", "q8_0")):  # the others' loaders are these, and hf's is the base's
        command(capsys, "train", "run.yaml", f"init_from={out}", f"run_dir=from-{out}", "train.steps=1", "evaluation.every_steps=1")
        assert abs(of_run(f"from-{out}")[0] - losses[-1]) < WHOLE[layout, dtype]


@pytest.mark.parametrize("layout", ADAPTERS)
def test_an_adapter_in_every_layout_is_gone_on_with(
    layout: str, command: Command, losses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    command(capsys, "export", "run", layout, "--format", layout)
    for more in ((), ("--run", "run"), ("--base", "base")):
        checks = {check["name"]: check for check in command(capsys, "verify", layout, "--json", *more)["checks"]}
        assert checks["deltas"]["passed"] is (True if more else None), checks["deltas"]
    more = (f"lora={{init_from: {layout}}}", f"run_dir=from-{layout}", "train.steps=1", "evaluation.every_steps=1")
    command(capsys, "train", "run.yaml", *more)
    assert abs(of_run(f"from-{layout}")[0] - losses[-1]) < 1e-5
    rows = command(capsys, "adapters", "diff", layout, "--base", "base", "--json")
    assert rows
    command(capsys, "adapters", "merge", "base", layout, f"merged-{layout}")
    found = command(capsys, "evaluate", f"merged-{layout}", "--data", "eval.jsonl", "--json")
    assert abs(found["loss"] - losses[-1]) < 1e-5
