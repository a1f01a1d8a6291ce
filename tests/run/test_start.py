"""Where a run starts: from a checkpoint, from another run, from files; what has changed since then, and what must not."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.checkpoint import model_dir, runs
from moe_train.commands.evaluate import evaluate_model
from moe_train.commands.export import ExportOptions, export
from moe_train.commands.train import train
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import parameters
from moe_train.model.transformer import abstract_model
from moe_train.run import loop, start
from moe_train.run.writer import Writer
from tests.run.tiny_config import LORA
from tests.run_dir import events, lines, losses


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "seed is 1, but the run in {run_dir} was started with 0; restore it, or choose another run_dir"),
        ({"model__model_dim": 64}, "model.model_dim is 64, but the run in {run_dir} was started with 32"),
        ({"train__batch_size": 16}, "train.batch_size is 16, but"),
        ({"train__seq_len": 16}, "train.seq_len is 16, but"),
        ({"optimizer": {"name": "lion", "learning_rate": 1e-3}}, "optimizer.name is lion, but"),
        ({"compute": {"param_dtype": "bfloat16"}}, "compute.param_dtype is bfloat16, but"),
        ({"data__train__sources": "fewer"}, "the training data have changed since the run in {run_dir} was started"),
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_checkpoint(finished, small_run, text, tmp_path, changes, said):
    if "data__train__sources" in changes:
        fewer = tmp_path / "fewer.jsonl"
        fewer.write_text("".join((text / "train.jsonl").read_text().splitlines(keepends=True)[:-1]))
        changes = {"data__train": [{"name": "files", "files": [str(fewer)], "record": {"name": "text"}}]}
    before = events(finished)
    with pytest.raises(ValueError, match=re.escape(said.format(run_dir=finished))) as caught:
        train(small_run(finished, train__steps=8, **changes))
    assert "\n" not in str(caught.value)
    assert events(finished) == before


def test_other_settings_may_change_and_are_written_down(after_two, small_run, capsys):
    run = small_run(after_two, evaluation__batches=1, train__steps=3)
    assert train(run) == loop.FINISHED
    assert "changed since the checkpoint: evaluation.batches None -> 1" in capsys.readouterr().err
    assert events(after_two)[-2]["changed"].keys() == {"evaluation.batches", "train.steps", "run_dir"}  # it was copied
    assert [line["step"] for line in lines(after_two)] == [1, 2, 3]
    assert lines(after_two, "eval")[-1]["loss_tokens"] < lines(after_two, "eval")[0]["loss_tokens"]


def test_a_damaged_last_checkpoint_is_said_and_passed_over(finished, tmp_path, small_run, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    for file in (run_dir / "checkpoints" / "6" / "optimizer").rglob("d/*"):
        file.write_bytes(b"")
    assert train(small_run(run_dir)) == loop.FINISHED
    assert "WARNING: the checkpoint of step 6 is damaged and was renamed to damaged-6" in capsys.readouterr().err
    assert events(run_dir)[-2]["event"] == "resume" and events(run_dir)[-2]["step"] == 4 and "6" in events(run_dir)[-2]["damaged"]
    assert losses(run_dir) == losses(finished)


def test_every_command_says_which_checkpoint_it_loaded(finished, tmp_path, small_run, text, caplog):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    with caplog.at_level("INFO", "moe_train"):
        named = export(f"{run_dir}@4", tmp_path / "named", options=TENSORS)
        assert (named["source"], named["step"]) == (str(run_dir), 4)
        assert evaluate_model(f"{run_dir}@2", [text / "eval.jsonl"])["checkpoint"] == 2
        assert f"weights of {run_dir}: the checkpoint of step 2 (the newest is that of step 6" in caplog.text
        for file in (run_dir / "checkpoints" / "6" / "params").rglob("d/*"):
            file.write_bytes(b"")
        record = export(run_dir, tmp_path / "damaged", options=TENSORS)
        assert evaluate_model(run_dir, [text / "eval.jsonl"])["checkpoint"] == 4
    assert record["step"] == 4
    assert (
        next((tmp_path / "damaged").glob("*.safetensors")).read_bytes()
        == next((tmp_path / "named").glob("*.safetensors")).read_bytes()
    )
    run = small_run(tmp_path / "next", init_from=f"{run_dir}@3", model=None, train__steps=2)
    assert train(run) == loop.FINISHED
    [base] = [event["base"] for event in events(tmp_path / "next") if "base" in event]
    assert (base["source"], base["step"]) == (str(run_dir), 3)


def test_checkpoints_on_a_disk_that_is_not_mounted_are_missed(finished, tmp_path, small_run):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    metrics = (run_dir / "metrics.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"has no checkpoint, but its run\.json shows that checkpoints were saved"):
            train(small_run(run_dir))
        assert (run_dir / "metrics.jsonl").read_bytes() == metrics
        (run_dir / "checkpoints").mkdir(exist_ok=True)


def test_damaged_small_files_do_not_keep_a_run_from_going_on(finished, tmp_path, small_run, caplog):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    (run_dir / "run.json").write_bytes(b"")
    (run_dir / "metrics.jsonl").write_bytes(b"\x00\n{}\n" + (run_dir / "metrics.jsonl").read_bytes())
    shutil.rmtree(run_dir / "checkpoints" / "6")
    (run_dir / "checkpoints" / "2" / "about" / "metadata").write_bytes(b"")
    assert train(small_run(run_dir)) == loop.FINISHED
    assert losses(run_dir) == losses(finished)
    for name in ("run.json", "metrics.jsonl:1", "metrics.jsonl:2", "checkpoints/2/about/metadata"):
        assert f"{run_dir}/{name}" in caplog.text


def test_a_restored_optimizer_is_split_as_its_weights_are(after_two, small_run, monkeypatch):
    found, restore = [], start.restore
    monkeypatch.setattr(start, "restore", lambda *args: found.append(restore(*args)) or found[-1])
    assert train(small_run(after_two, train__steps=2)) == loop.FINISHED
    state = found[0].state
    (adam,) = (part for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu"))
    for path, x in state.trainable.items():
        assert x.sharding == adam.mu[path].sharding == adam.nu[path].sharding, path
    assert any(x.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor") for x in adam.mu.values())


TENSORS = ExportOptions(depth="tensors")


def weights(run: config.Config, run_dir: Path) -> dict[str, np.ndarray]:
    with jax.set_mesh(make_mesh(run.mesh)):
        shapes = parameters(abstract_model(run.model, run.compute, run.lora))[1]
        return {path: np.asarray(x) for path, x in model_dir.load_parameters(run_dir, shapes).items()}


@pytest.mark.slow
def test_adapters_on_another_run(finished, tmp_path, small_run, monkeypatch, text):
    base, run_dir = tmp_path / "base", tmp_path / "lora"
    shutil.copytree(finished, base)
    lora = LORA | {"train": ["final_norm"]}
    run = small_run(run_dir, init_from=str(base), model=None, lora=lora, train__steps=4, data__tokenizer=None)
    write = Writer.train

    def interrupt(writer: Writer, step: int, figures: dict) -> None:
        write(writer, step, figures)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "train", interrupt)
        assert train(run) == loop.UNFINISHED
    assert train(run) == loop.FINISHED

    said = runs.read_run(run_dir)
    assert said.model == small_run(base).model and said.training_data().tokenizer.path == str(base / "tokenizer")
    full, adapted = weights(small_run(base), base), weights(said, run_dir)
    assert {path for path in full if not np.array_equal(full[path], adapted[path])} == {"final_norm.scale"}  # the base's bytes
    assert {path for path in adapted if path not in full} == {path for path in adapted if path.endswith(("lora_a", "lora_b"))}
    assert all(np.any(x != 0) for path, x in adapted.items() if path.endswith("lora_b"))
    assert lines(run_dir, "eval")[0]["loss"] == pytest.approx(lines(base, "eval")[-1]["loss"], rel=1e-6)
    assert lines(run_dir, "eval")[-1]["loss"] < lines(run_dir, "eval")[0]["loss"] - 0.01
    assert evaluate_model(run_dir, [text / "eval.jsonl"])["loss"] == pytest.approx(lines(run_dir, "eval")[-1]["loss"], rel=1e-5)
    assert [event["base"]["step"] for event in events(run_dir) if "base" in event] == [6, 6]
    held = {path.name for path in (run_dir / "checkpoints" / "4" / "params").rglob("*")}
    assert held and not any("embed" in name for name in held)

    # The base goes on training: its newest checkpoint is another one, and the adapters stay with theirs.
    assert train(small_run(base, train__steps=7)) == loop.FINISHED
    longer = run.model_copy(update={"train": run.train.model_copy(update={"steps": 5})})
    assert train(longer) == loop.FINISHED

    for file in (base / "checkpoints" / "6" / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-1])
    longer = run.model_copy(update={"train": run.train.model_copy(update={"steps": 6})})
    with pytest.raises(ValueError, match=r"the base weights in .* have changed since this run started"):
        train(longer)
    with pytest.raises(ValueError, match="is a run with adapters; export it with --merge"):
        train(small_run(tmp_path / "next", init_from=str(run_dir), model=None, data__tokenizer=None))


def test_adapters_on_files(finished, tmp_path, small_run, text):
    """From an export: resumed on the same bytes, refused on others."""
    export(finished, tmp_path / "model")
    run = small_run(
        tmp_path / "lora", init_from=str(tmp_path / "model"), model=None, lora=LORA, train__steps=2, data__tokenizer=None
    )
    assert train(run) == loop.FINISHED
    base = events(tmp_path / "lora")[0]["base"]
    assert base["step"] is None and base["hashes"].keys() >= {"lm_head.weight", "model.norm.weight"}
    start = lines(tmp_path / "lora", "eval")[0]["loss"]
    assert start == pytest.approx(lines(finished, "eval")[-1]["loss"], rel=1e-6)
    assert evaluate_model(tmp_path / "model", [text / "eval.jsonl"])["loss"] == pytest.approx(start, rel=0.1)  # other rows

    (file,) = (tmp_path / "model").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    longer = run.model_copy(update={"train": run.train.model_copy(update={"steps": 3})})
    with pytest.raises(
        ValueError, match=r"the base weights in .*model have changed since this run started \(1 tensors or files, the first"
    ):
        train(longer)


def test_all_weights_of_another_run(finished, tmp_path, small_run):
    run = small_run(tmp_path, init_from=str(finished), model=None, train__steps=2)
    assert train(run) == loop.FINISHED
    assert lines(tmp_path, "eval")[0]["loss"] == pytest.approx(lines(finished, "eval")[-1]["loss"], rel=1e-6)
    with pytest.raises(
        ValueError, match=r"model.norm_eps is 0.001, but 1e-05 in .*; leave model out, since init_from determines it"
    ):
        train(small_run(tmp_path, init_from=str(finished), model__norm_eps=1e-3))
