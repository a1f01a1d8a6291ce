"""Whole runs of a tiny dense model on 8 devices: what they write, refuse, survive and say."""

from __future__ import annotations

import json
import math
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train import config
from moe_train.checkpoint import manager, model_dir, runs
from moe_train.commands import evaluate
from moe_train.commands.evaluate import evaluate_dir
from moe_train.commands.export import export
from moe_train.commands.train import train
from moe_train.config import yaml_file
from moe_train.data.batches.loader import Loader
from moe_train.data.tokenizers.load import load_tokenizer, tokenizer_at
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import parameters
from moe_train.model.transformer import init_model
from moe_train.run import loop
from moe_train.run.inputs import open_inputs
from moe_train.run.resolve import resolve
from moe_train.run.writer import Writer
from moe_train.train.objectives import next_token

LORA = {"targets": [{"modules": ["attention.*", "ffn.*"], "rank": 2, "alpha": 4.0}]}


def lines(run_dir: Path, kind: str = "train") -> list[dict]:
    read = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if line["kind"] == kind]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in lines(run_dir)]


def events(run_dir: Path) -> list[dict]:
    return json.loads((run_dir / "run.json").read_text())["events"]


def steps_in(run_dir: Path) -> list[int]:
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit())


def weights(run: config.Config, run_dir: Path) -> dict[str, np.ndarray]:
    with jax.set_mesh(make_mesh(run.mesh)):
        shapes = parameters(jax.eval_shape(lambda: init_model(0, run.model, run.compute, run.lora)))[1]
        return {path: np.asarray(x) for path, x in model_dir.load_parameters(run_dir, shapes).items()}


@pytest.fixture(scope="module")
def finished(small_run: Callable[..., config.Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 6 steps that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("run")
    assert train(small_run(run_dir)) == loop.FINISHED
    return run_dir


@pytest.fixture
def after_two(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run as it was after step 2."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    for done in (3, 4, 6):
        shutil.rmtree(run_dir / "checkpoints" / str(done))
    return run_dir


def test_what_a_run_leaves(finished, small_run):
    run = small_run(finished)
    assert [line["step"] for line in lines(finished)] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(finished, "eval")] == [0, 3, 6]
    first, last = lines(finished)[0], lines(finished)[-1]
    assert first["cross_entropy"] == pytest.approx(math.log(288), rel=0.02) and last["loss"] < first["loss"] - 0.3
    assert last["tokens_per_second"] == pytest.approx(8 * 32 / last["seconds"]) and 0 < last["mfu"] < 1
    assert steps_in(finished) == [2, 3, 4, 6]  # 3 because it was the best so far
    assert yaml_file.load(finished / "config.yaml") == run
    start, stop = events(finished)
    assert (start["event"], stop["event"], stop["step"], stop["reason"]) == ("start", "stop", 6, "finished")
    assert start["versions"]["jax"] == jax.__version__ and start["hardware"]["devices"] == 8 and len(start["config_sha256"]) == 64


def test_a_run_has_its_tokenizer(finished, text, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved, ignore=shutil.ignore_patterns("[23]"))
    opened = model_dir.open_model(moved)
    assert opened.tokenizer.files[0] == moved / "tokenizer" / "tokenizer.json"
    assert opened.tokenizer.identity == load_tokenizer(tokenizer_at(text / "tokenizer")).identity


def test_a_finished_run_is_left_alone(finished, small_run, capsys):
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*"))
    assert train(small_run(finished)) == loop.FINISHED
    assert "all 6 steps are done; raise train.steps, epochs or tokens to go on" in capsys.readouterr().out
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*")) == before


def test_held_out_loss_is_the_mean_over_loss_tokens(finished, small_run, text):
    """Against log-softmax of all logits at once, and against the command's function."""
    run = small_run(finished)
    loader = Loader(run.data, "eval", load_tokenizer(run.data.tokenizer), batch_size=8, seq_len=32, seed=0)
    total = count = 0.0
    with jax.set_mesh(make_mesh(run.mesh)):
        shapes = parameters(jax.eval_shape(lambda: init_model(0, run.model, run.compute)))
        model = shapes[0].unflatten([model_dir.load_parameters(finished, shapes[1])[path] for path in shapes[1]])
        logits_of = jax.jit(lambda batch: model.logits(model(batch.tokens, batch.positions, batch.segment_ids)[0]))
        for batch in loader.iterate():
            log_probs = jax.nn.log_softmax(np.asarray(logits_of(loop.put_batch(batch, make_mesh(run.mesh))), np.float64))
            chosen = np.take_along_axis(np.asarray(log_probs), batch.targets[..., None], axis=-1)[..., 0]
            total, count = total - float(np.sum(chosen * batch.loss_mask)), count + batch.loss_mask.sum()
    said = lines(finished, "eval")[-1]
    assert said["loss_tokens"] == count and said["loss"] == pytest.approx(total / count, rel=1e-5)
    answer = evaluate_dir(finished, [text / "eval.jsonl"])
    assert answer["loss"] == pytest.approx(said["loss"], rel=1e-5) and answer["loss_tokens"] == count
    assert answer["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_a_file_is_evaluated_as_the_run_reads_its_own(small_run, tmp_path):
    own = {"name": "completion", "prompt": "ask", "completion": "say"}
    run = small_run(tmp_path / "run", data__train=[{"name": "files", "files": ["a.jsonl"], "record": own}])
    file = tmp_path / "held_out.jsonl"
    file.write_text('{"ask": "2 + 3?", "say": "5", "id": 1}')
    assert evaluate._record(file, resolve(run, 8)) == config.CompletionRecord(**own, too_long="truncate")
    with pytest.raises(ValueError, match=r"held_out\.jsonl:1: no column is one of .*; the record has 'ask, say, id'"):
        evaluate._record(file, None)
    file.write_text('{"question": "2 + 3?", "answer": "5"}')
    assert evaluate._record(file, resolve(run, 8)).prompt == "question"


def test_interrupted_and_started_again(tmp_path, finished, small_run, monkeypatch, capsys):
    """Ctrl-C during step 3, in this process; the handlers are as before afterwards."""
    write, before = Writer.train, signal.getsignal(signal.SIGINT)

    def interrupt(writer: Writer, step: int, figures: dict) -> None:
        write(writer, step, figures)
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Writer, "train", interrupt)
    run = small_run(tmp_path)
    assert train(run) == loop.UNFINISHED
    assert signal.getsignal(signal.SIGINT) is before
    assert events(tmp_path)[-1]["reason"] == "SIGINT" and steps_in(tmp_path)[-1] == events(tmp_path)[-1]["step"] == 4
    assert train(run) == loop.FINISHED
    assert losses(tmp_path) == losses(finished)
    assert "continuing after step 4" in capsys.readouterr().err


def test_saves_every_so_many_minutes(tmp_path, small_run):
    run = small_run(
        tmp_path, checkpoint={"every_steps": 1000, "every_minutes": 1e-6, "keep_last": 100, "keep_best": False}, data__eval=[]
    )
    assert train(run) == loop.FINISHED
    assert steps_in(tmp_path) == [2, 4, 6]  # agreed one step late, then the clock starts again
    assert not lines(tmp_path, "eval")


# --- steps that are not finite ---------------------------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch, small_run, tmp_path: Path) -> Callable[..., None]:
    """`poison(2, 4)`: the loss of the batches of steps 2 and 4 is no number."""

    def spoil(*steps: int) -> None:
        run = small_run(tmp_path)
        loader = Loader(run.data, "train", load_tokenizer(run.data.tokenizer), batch_size=8, seq_len=32, seed=0)
        marks = np.stack([loader.batch(s - 1).tokens[0] for s in steps])
        plain = next_token.loss

        def loss(inputs, of_step):
            terms = plain(inputs, of_step)
            first = jax.sharding.reshard(inputs.batch.tokens, jax.sharding.PartitionSpec())[0]
            return terms._replace(sum=jnp.where(jnp.any(jnp.all(first == marks, axis=1)), jnp.nan, terms.sum))

        monkeypatch.setattr(next_token, "loss", loss)

    return spoil


def test_a_step_that_is_not_finite_changes_nothing(tmp_path, small_run, poison, capsys):
    poison(2, 6)
    run = small_run(tmp_path, checkpoint={"every_steps": 1, "keep_last": 10})
    assert train(run) == loop.FINISHED
    assert [loss is None for loss in losses(tmp_path)] == [False, True, False, False, False, True]
    assert [line["skipped"] for line in lines(tmp_path)] == [0, 1, 1, 1, 1, 2]
    assert steps_in(tmp_path) == [1, 3, 4, 5, 6]  # a skipped step rotates no good checkpoint away; the last is always saved
    assert "step 2: loss nan" in capsys.readouterr().err
    with jax.set_mesh(make_mesh(run.mesh)):
        shapes = parameters(jax.eval_shape(lambda: init_model(0, run.model, run.compute)))[1]
        at = {s: model_dir.load_parameters(tmp_path, shapes, s) for s in (4, 5, 6)}
    same = {s: all(np.array_equal(at[5][path], at[s][path]) for path in shapes) for s in (4, 6)}
    assert same == {4: False, 6: True}


def test_too_many_of_them_stop_the_run(tmp_path, small_run, poison):
    poison(2, 4)
    run = small_run(tmp_path, train__max_skipped_steps=1)
    with pytest.raises(
        RuntimeError, match=r"2 steps had a loss or gradient that is not finite, the last step 4; train.max_skipped_steps is 1"
    ):
        train(run)
    assert steps_in(tmp_path) == [3]
    assert events(tmp_path)[-1]["reason"].startswith("RuntimeError: 2 steps")
    with pytest.raises(RuntimeError, match="2 steps had"):  # the count is in the checkpoint
        train(run)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "seed is 1, but {run_dir} was started with 0; set it back, or choose another run_dir"),
        ({"model__model_dim": 64}, "model.model_dim is 64, but {run_dir} was started with 32"),
        ({"train__batch_size": 16}, "train.batch_size is 16, but"),
        ({"train__seq_len": 16}, "train.seq_len is 16, but"),
        ({"optimizer": {"name": "lion", "learning_rate": 1e-3}}, "optimizer.name is lion, but"),
        ({"compute": {"param_dtype": "bfloat16"}}, "compute.param_dtype is bfloat16, but"),
        ({"data__train__sources": "fewer"}, "the training data of {run_dir} are not those that it was started with"),
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


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"mesh": {"data": 4}}, ValueError, "needs 4 devices, but 8 are here"),
        ({"mesh": {"fsdp": -1}, "train__batch_size": 4}, ValueError, "do not divide over mesh data x fsdp x expert = 8"),
        ({"mesh": {"tensor": -1}}, ValueError, "mesh.tensor 8 does not divide num_kv_heads 2"),
        ({"data": None}, ValueError, "the config has no data section; state data.train and data.tokenizer"),
        ({"model__vocab_size": 256}, ValueError, "vocab_size is 256"),
        ({"init_from": "nowhere", "model": None}, FileNotFoundError, "nowhere: no such folder"),
        ({"lora": LORA}, ValueError, "lora needs init_from"),
        ({"optimizer__schedule": {"name": "linear", "warmup_steps": 7}}, ValueError, "warmup_steps 7 exceed the 6 steps"),
    ],
    ids=str,
)
def test_refused_before_anything_is_written(tmp_path, small_run, changes, error, said):
    with pytest.raises(error, match=said):
        train(small_run(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


# --- what changes, and what is damaged ---------------------------------------------------------------------------------


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
    assert "WARNING: the checkpoint of step 6 is damaged, and was renamed to damaged-6" in capsys.readouterr().err
    assert events(run_dir)[-2]["event"] == "resume" and events(run_dir)[-2]["step"] == 4 and "6" in events(run_dir)[-2]["damaged"]
    assert losses(run_dir) == losses(finished)


def test_a_restored_optimizer_is_split_as_its_weights_are(after_two, small_run, monkeypatch):
    found, restore = [], manager.restore
    monkeypatch.setattr(manager, "restore", lambda *args: found.append(restore(*args)) or found[-1])
    assert train(small_run(after_two, train__steps=2)) == loop.FINISHED
    state = found[0].state
    (adam,) = (part for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu"))
    for path, x in state.trainable.items():
        assert x.sharding == adam.mu[path].sharding == adam.nu[path].sharding, path
    assert any(x.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor") for x in adam.mu.values())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's threads, cut short
def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(after_two, small_run, monkeypatch, capfd):
    """Files cannot grow past 4 kB from the figures of step 3 on: neither the checkpoint nor metrics.jsonl fit."""
    write, limits = Writer.train, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(writer: Writer, step: int, figures: dict) -> None:
        write(writer, step, figures)
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    monkeypatch.setattr(Writer, "train", fill_the_disk)
    run = small_run(after_two, data__eval=[])
    try:
        with pytest.raises(RuntimeError, match=r"could not save a checkpoint in .*; the one of step 2 is intact$"):
            train(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (after_two / "checkpoints").iterdir()] == ["2"]
    assert "Traceback" not in capfd.readouterr().err
    monkeypatch.undo()
    assert train(run) == loop.FINISHED


def test_length_in_epochs_and_tokens(small_run, tmp_path):
    run = small_run(tmp_path, train={"epochs": 2, "batch_size": 8, "seq_len": 32})
    with jax.set_mesh(make_mesh(run.mesh)):
        loader = open_inputs(resolve(run, 8), next_token.next_token()).train
    assert loader.total_steps(run.train) == loader.steps(2) == pytest.approx(2 * loader.num_rows / 8, abs=1)
    tokens = config.Train(tokens=8 * 32 * 5 + 1, batch_size=8, seq_len=32)
    assert loader.total_steps(tokens) == 6


# --- adapters on a base ------------------------------------------------------------------------------------------------


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
    assert evaluate_dir(run_dir, [text / "eval.jsonl"])["loss"] == pytest.approx(lines(run_dir, "eval")[-1]["loss"], rel=1e-5)
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
    assert evaluate_dir(tmp_path / "model", [text / "eval.jsonl"])["loss"] == pytest.approx(start, rel=0.1)  # other rows

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
    with pytest.raises(ValueError, match=r"model.norm_eps is 0.001, but 1e-05 in .*; leave model out where init_from is given"):
        train(small_run(tmp_path, init_from=str(finished), model__norm_eps=1e-3))
