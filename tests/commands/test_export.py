"""From a run's checkpoint to files: the same as from the weights in memory."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from moe_train import config
from moe_train.checkpoint import manager, model_dir
from moe_train.cli import main
from moe_train.commands import write_and_prove
from moe_train.commands.export import _command, export
from moe_train.commands.train_tokenizer import train_bpe
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import Parameters
from moe_train.train.state import create_state
from moe_train.weights import external, peft, safetensors_files
from moe_train.weights.texts import Texts
from tests.random_parameters import random_parameters

MODEL = config.Model(
    family="mixtral",
    vocab_size=300,
    model_dim=16,
    num_layers=2,
    attention=config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=6),
    ffn=config.MoeFfn(name="moe", ffn_dim=12, num_experts=4, experts_per_token=2),
)
LORA = config.Lora(targets=(config.LoraTarget(modules=("attention.*", "ffn.*"), rank=2, alpha=3.0),))
MESH = config.Mesh(fsdp=2, expert=2, tensor=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    return train_bpe(["some text to learn from"] * 5, 270, tmp_path_factory.mktemp("tokenizer") / "t")


def save_run(directory: Path, weights: Parameters, tokenizer: HuggingFace, **more: Any) -> config.Config:
    """A run with one checkpoint, as training leaves it behind."""
    source = config.FileSource(name="files", files=("data.txt",), record=config.TextRecord(name="text"))
    named = config.HuggingFaceTokenizer(name="huggingface", path=str(tokenizer.path))
    run = config.Config(
        name="run",
        run_dir=str(directory),
        model=MODEL,
        mesh=MESH,
        data=config.Data(tokenizer=named, train=(source,)),
        train=config.Train(steps=1, batch_size=4, seq_len=16),
        optimizer=config.AdamW(name="adamw", learning_rate=1e-3),
        loss=config.Loss(load_balance_loss_coef=0.02, router_z_loss_coef=0.0),
        **more,
    )
    base = manager.Base(run.init_from, None, external.hashes(run.init_from)) if run.init_from else None
    about = manager.About(config=run.model_dump(mode="json"), row=0, data="", base=base)
    with manager.opened(directory, run.checkpoint) as checkpoints:
        manager.save(checkpoints, 1, create_state(weights, optax.sgd(0.1), run.lora), about)
    return run


def same_files(one: Path, other: Path, *but: str) -> None:
    names = {file.name for file in one.iterdir()}
    assert names == {file.name for file in other.iterdir()}
    assert filecmp.cmpfiles(one, other, names - set(but), shallow=False)[1:] == ([], [])


def test_a_lora_run_becomes_a_merged_model_and_an_adapter(tokenizer: HuggingFace, tmp_path: Path) -> None:
    with jax.set_mesh(make_mesh(MESH)):
        weights = random_parameters(MODEL, lora=LORA)
        plain = {path: x for path, x in weights.items() if ".lora_" not in path}
        write_and_prove.export(plain, MODEL, tmp_path / "base", dtype="bfloat16")
        weights |= external.load_parameters(tmp_path / "base", plain_shapes(plain))
        save_run(tmp_path / "run", weights, tokenizer, init_from=str(tmp_path / "base"), lora=LORA)
        texts = Texts(tokenizer, tokenizer.chat_template, "")
        write_and_prove.export(weights, MODEL, tmp_path / "merged", dtype="bfloat16", lora=LORA, merge=True, texts=texts)
        peft.export_adapter(weights, MODEL, LORA, tmp_path / "adapter", base_model=str(tmp_path / "base"), texts=texts)
    report = export(tmp_path / "run", tmp_path / "hf", "hf", merge=True)
    (merge,) = (check["figures"] for check in report["checks"] if check["name"] == "merge")
    assert merge["count"] == 2 * (4 + 3 * 4)
    same_files(tmp_path / "hf", tmp_path / "merged", "moe_train.yaml", "export_proof.json")
    line = export(tmp_path / "run", tmp_path / "peft", "peft", server="vllm")["serve"]
    assert line == f"vllm serve {tmp_path}/base --enable-lora --max-lora-rank 8 --lora-modules peft={tmp_path}/peft"
    opened = model_dir.open_model(tmp_path / "run")
    assert opened.run is not None
    on_a_run = opened._replace(run=opened.run.model_copy(update={"init_from": str(tmp_path / "run")}))
    line = _command("vllm", "peft", on_a_run, "out")
    assert line is not None and line.startswith(
        f"moe-train export {tmp_path}/run BASE_MODEL && vllm serve BASE_MODEL --enable-lora"
    )
    assert (tmp_path / "peft/export_proof.json").is_file()
    assert "rank: 2" in (tmp_path / "hf/moe_train.yaml").read_text()
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == tokenizer.files[0].read_bytes()
    with pytest.raises(ValueError, match="--merge"):
        export(tmp_path / "run", tmp_path / "other", "hf")
    with pytest.raises(ValueError, match="--format hf"):
        export(tmp_path / "run", tmp_path / "other", "peft", merge=True)
    with pytest.raises(FileExistsError, match="exists already"):
        export(tmp_path / "run", tmp_path / "hf", "hf", merge=True)
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"the adapters of .*run belong to the weights in .*base, which .* has not"):
        export(tmp_path / "run", tmp_path / "other", "hf", merge=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("layout", ["peft", "mistral-lora"])
def test_an_adapter_that_was_written_wrong_is_not_exported(
    layout: Any, tokenizer: HuggingFace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with jax.set_mesh(make_mesh(MESH)):
        weights = random_parameters(MODEL, lora=LORA)
        plain = {path: x for path, x in weights.items() if ".lora_" not in path}
        write_and_prove.export(plain, MODEL, tmp_path / "base", dtype="float32", depth="tensors")
        save_run(tmp_path / "run", weights, tokenizer, init_from=str(tmp_path / "base"), lora=LORA)
    write = safetensors_files.write_file

    def swap_experts(file: Path, specs: list[safetensors_files.Spec], tensor: Callable[..., np.ndarray]) -> None:
        """Give expert 3 the matrices of expert 0."""
        write(file, specs, lambda spec: tensor(spec._replace(name=spec.name.replace("experts.3.", "experts.0."))))

    monkeypatch.setattr(safetensors_files, "write_file", swap_experts)
    with pytest.raises(RuntimeError, match=r"the proof failed \(deltas\): the adapter of .*\[0, 3\] in the files is not the one"):
        export(tmp_path / "run", tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


def plain_shapes(weights: Parameters) -> dict[str, jax.ShapeDtypeStruct]:
    return {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for path, x in weights.items()}


def test_a_run_from_random_weights_becomes_a_model(tokenizer: HuggingFace, tmp_path: Path) -> None:
    with jax.set_mesh(make_mesh(MESH)):
        weights = random_parameters(MODEL)
        save_run(tmp_path / "run", weights, tokenizer)
        export(tmp_path / "run", tmp_path / "hf")
        save_run(tmp_path / "tuned", weights, tokenizer, init_from=str(tmp_path / "hf"))
        (tmp_path / "hf").rename(tmp_path / "gone")
        with pytest.raises(FileNotFoundError, match=r"hf, from which the run started, is not here .* \(--dtype\)"):
            export(tmp_path / "tuned", tmp_path / "other")
        export(tmp_path / "tuned", tmp_path / "hf", dtype="float32")
        loaded = external.load_parameters(tmp_path / "hf", plain_shapes(weights))
    assert all(np.array_equal(np.asarray(loaded[path]), np.asarray(x)) for path, x in weights.items())
    with pytest.raises(ValueError, match="nothing to merge"):
        export(tmp_path / "run", tmp_path / "other", merge=True)
    with pytest.raises(ValueError, match="trained in full"):
        export(tmp_path / "run", tmp_path / "other", "peft")
    with pytest.raises(ValueError, match="it is no run"):
        export(tmp_path / "hf", tmp_path / "other", "peft")
    assert not (tmp_path / "other").exists()


def test_another_tools_model_is_turned_into_every_layout_and_back(tokenizer: HuggingFace, tmp_path: Path) -> None:
    with jax.set_mesh(make_mesh(MESH)):
        weights = random_parameters(MODEL)
        texts = Texts(tokenizer, tokenizer.chat_template)
        write_and_prove.export(weights, MODEL, tmp_path / "hf", dtype="bfloat16", texts=texts, depth="tensors")
    before = external.hashes(tmp_path / "hf")
    for layout in ("mistral", "gguf"):
        export(tmp_path / "hf", tmp_path / layout, layout, depth="tensors")
        record = export(tmp_path / layout, tmp_path / f"{layout}-hf", dtype="bfloat16", depth="tensors")
        assert record["dtype"] == "bfloat16" and record["source"] == str(tmp_path / layout)
        assert external.hashes(tmp_path / f"{layout}-hf") == before
        assert external.read_model(tmp_path / f"{layout}-hf") == MODEL
    with pytest.raises(ValueError, match="dtype q8_0 is not one of hf's"):
        export(tmp_path / "hf", tmp_path / "other", dtype="q8_0")
    with pytest.raises(ValueError, match="max-shard-size is 'much'"):
        export(tmp_path / "hf", tmp_path / "other", max_shard_size="much")
    export(tmp_path / "hf", tmp_path / "shards", max_shard_size="10KB", depth="tensors")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    assert not (tmp_path / "other").exists()


def test_verify_says_what_it_found_with_its_exit_code(
    tokenizer: HuggingFace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with jax.set_mesh(make_mesh(MESH)):
        save_run(tmp_path / "run", random_parameters(MODEL), tokenizer)

    def verify(*arguments: str) -> tuple[int, dict[str, Any]]:
        with pytest.raises(SystemExit) as ended:
            main.main(["verify", str(tmp_path / "hf"), "--json", *arguments])
        return int(ended.value.code or 0), json.loads(capsys.readouterr().out)

    with pytest.raises(SystemExit) as ended:
        main.main(["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--proof", "tensors"])
    assert not ended.value.code and "not checked" in capsys.readouterr().out
    record = json.loads((tmp_path / "hf/export_proof.json").read_text())
    assert record["step"] == 1 and len(record["config_sha256"]) == 64 and record["run"] == "run"
    code, found = verify("--run", str(tmp_path / "run"))
    checks = {check["name"]: check["passed"] for check in found["checks"]}
    assert code == 0 and found["passed"] and checks["merge"] and checks["answers"] is None

    (shard,) = (tmp_path / "hf").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    code, found = verify()
    assert code == 1 and {check["name"] for check in found["checks"] if check["passed"] is False} == {"files", "tensors"}
    code, found = verify("--run", str(tmp_path / "run"))
    (merge,) = (check for check in found["checks"] if check["name"] == "merge")
    assert merge["said"].endswith("is not head.weight[] in memory")


INTERRUPTED = """
import os, resource, signal, sys
from pathlib import Path
import jax
from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import parameters
from moe_train.model.transformer import init_model
from moe_train.weights import strided
model = config.Model(
    **dict(family="mixtral", vocab_size=64, model_dim=32, num_layers=2, max_seq_len=64),
    attention=config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8),
    ffn=config.MoeFfn(name="moe", ffn_dim=48, num_experts=4, experts_per_token=2),
)
if sys.argv[2] == "kill":
    parts, calls = strided.parts, []
    def counted(x):
        calls.append(0)
        if len(calls) == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return parts(x)
    strided.parts = counted
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))
with jax.set_mesh(make_mesh(config.Mesh())):
    weights = parameters(init_model(0, model, config.Compute()))[1]
    write_and_prove.export(weights, model, Path(sys.argv[1]), dtype="bfloat16", max_shard_bytes=20_000)
"""


@pytest.mark.parametrize("how", ["kill", "no room"])
def test_an_export_that_is_killed_or_cannot_write_leaves_nothing_that_looks_finished(how: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "out"), how]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == (-9 if how == "kill" else 1), done.stderr
    left = list(tmp_path.iterdir())
    assert len(left) == (1 if how == "kill" else 0)
    for path in left:
        assert path.name.startswith(".out.unfinished-") and not (path / "export_proof.json").exists()
        assert any(path.glob("*.safetensors"))
    if how == "no room":
        assert "File too large" in done.stderr
