"""Whole runs of a tiny dense model on 8 devices: what they write and refuse, and steps that are not finite."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train import config
from moe_train.checkpoint import model_dir
from moe_train.checkpoint.metadata import read_saved
from moe_train.commands import evaluate
from moe_train.commands.export import export
from moe_train.commands.prepare import trace
from moe_train.commands.train import train
from moe_train.config import yaml_file
from moe_train.data.batches.batch import BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.tokenizers.load import load_tokenizer
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import parameters
from moe_train.model.transformer import abstract_model
from moe_train.run import loop
from moe_train.run.goodput import read_sessions
from moe_train.run.resolve import resolve
from moe_train.train.objectives import next_token
from tests.run.tiny_config import LORA
from tests.run_dir import events, lines, losses, steps_in


def test_what_a_run_leaves(finished, small_run):
    run = small_run(finished)
    assert [line["step"] for line in lines(finished)] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(finished, "eval")] == [0, 3, 6]
    first, last = lines(finished)[0], lines(finished)[-1]
    assert first["cross_entropy"] == pytest.approx(math.log(288), rel=0.02) and last["loss"] < first["loss"] - 0.3
    assert last["tokens_per_second"] == pytest.approx(8 * 32 / last["seconds"]) and last["mfu"] > 0
    assert steps_in(finished) == [2, 3, 4, 6]  # 3 because it was the best so far
    assert yaml_file.load_config(finished / "config.yaml") == run
    assert 0 < last["goodput"] < 1 and read_sessions(finished)[0].end == "finished"
    start, stop = events(finished)
    assert (start["event"], stop["event"], stop["step"], stop["reason"]) == ("start", "stop", 6, "finished")
    assert start["versions"]["jax"] == jax.__version__ and start["hardware"]["devices"] == 8 and len(start["config_sha256"]) == 64


def test_a_finished_run_is_left_alone(finished, small_run, capsys):
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*"))
    assert train(small_run(finished)) == loop.FINISHED
    assert "all 6 steps are done; raise train.steps, train.epochs or train.tokens to continue" in capsys.readouterr().out
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*")) == before


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


# --- steps that are not finite ---------------------------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch, small_run, tmp_path: Path) -> Callable[..., None]:
    """`poison(2, 4)`: the loss of the batches of steps 2 and 4 is no number."""

    def spoil(*steps: int) -> None:
        run = small_run(tmp_path)
        loader = Loader(run.data, "train", load_tokenizer(run.data.tokenizer), BatchRows(8, 32), seed=0)
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
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("step 2 skipped", "step 2:", "step 6:"))]
    assert said[0].startswith("step 2 skipped, 1 so far: loss nan")
    assert said[1] == "step 2: first that is not finite: the loss, although the output of every layer is finite"
    traced = trace(run, 2)
    assert said[2].startswith(f"step 2: the {len(traced)} records of the step: {traced[0]['file']}:{traced[0]['number']}, ")
    assert said[3].startswith("step 2: to try: lower optimizer.learning_rate (0.01)") and len(said) == 4  # the first one only
    with jax.set_mesh(make_mesh(run.mesh)):
        shapes = parameters(abstract_model(run.model, run.compute))[1]
        at = {s: model_dir.load_parameters(tmp_path, shapes, s) for s in (4, 5, 6)}
    same = {s: all(np.array_equal(at[5][path], at[s][path]) for path in shapes) for s in (4, 6)}
    assert same == {4: False, 6: True}


def test_too_many_of_them_stop_the_run(tmp_path, small_run, poison):
    poison(2, 4)
    run = small_run(tmp_path, train__max_skipped_steps=1)
    with pytest.raises(
        RuntimeError,
        match=r"2 steps had a loss or gradient that is not finite, the last one step 4, and train.max_skipped_steps is 1",
    ):
        train(run)
    assert "; step 2: first that is not finite: the loss" in events(tmp_path)[-1]["reason"]
    assert steps_in(tmp_path) == [3]
    assert events(tmp_path)[-1]["reason"].startswith("RuntimeError: 2 steps")
    with pytest.raises(RuntimeError, match="2 steps had"):  # the count is in the checkpoint
        train(run)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"mesh": {"data": 4}}, ValueError, "needs 4 devices, but 8 are available"),
        ({"mesh": {"fsdp": -1}, "train__batch_size": 4}, ValueError, "do not divide evenly over mesh data x fsdp x expert = 8"),
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


# --- weights that no step can be taken from ----------------------------------------------------------------------------


def faster(run_dir: Path, rate: float, small_run: Callable[..., config.Config], **changes: Any) -> config.Config:
    """The run with another learning rate, and a checkpoint after each step."""
    optimizer = {"name": "adamw", "learning_rate": rate, "schedule": {"name": "constant"}}
    settings = {"every_steps": 1, "keep_last": 1}
    return small_run(run_dir, optimizer=optimizer, checkpoint=settings, train__max_skipped_steps=0, data__eval=[], **changes)


@pytest.mark.parametrize("rate", [1e30, 1e12])
def test_weights_that_a_learning_rate_ruins_do_not_replace_the_last_good_ones(after_two, small_run, rate, capfd):
    """Ruined weights with a finite loss: not saved if they are too large, else set aside at the next start, whatever keep_last."""
    with pytest.raises(RuntimeError, match=r"lower optimizer.learning_rate"):
        train(faster(after_two, rate, small_run))
    assert 2 in steps_in(after_two)
    assert train(faster(after_two, 1e-2, small_run)) == loop.FINISHED
    assert all(loss is not None for loss in losses(after_two))
    assert [line["step"] for line in lines(after_two)] == [1, 2, 3, 4, 5, 6]
    if rate == 1e12:
        assert "was renamed to unusable-3; continuing from step 2" in capfd.readouterr().err
        assert (after_two / "checkpoints" / "unusable-3").is_dir()


def test_padding_is_not_counted_as_tokens(small_run, tmp_path):
    run = small_run(tmp_path, train__steps=4, train__seq_len=64)
    loader = Loader(run.data, "train", load_tokenizer(run.data.tokenizer), BatchRows(8, 64), seed=0)
    assert train(run) == loop.FINISHED
    tokens = [int((loader.batch(step).segment_ids != 0).sum()) for step in range(4)]
    assert min(tokens) < 8 * 64
    assert [line["tokens_per_second"] * line["seconds"] for line in lines(tmp_path)] == pytest.approx(tokens, rel=0.01)


# --- bfloat16 weights --------------------------------------------------------------------------------------------------


ONE_LAYER: dict[str, Any] = {"model__num_layers": 1, "mesh": {"data": 8}, "data__eval": []}
"""Changes that make a run quick to compile."""


def bits_of(run_dir: Path, step: int) -> dict[str, list[int]]:
    """The bit sums of all arrays of a checkpoint."""
    return read_saved(run_dir / "checkpoints" / str(step)).sums


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["float32_master", "stochastic"])
def test_a_run_in_bfloat16_resumes_bit_for_bit(tmp_path, small_run, rounding):
    def run(name: str, **changes: Any) -> config.Config:
        optimizer = {"name": "adamw", "learning_rate": 1e-2, "rounding": rounding}
        dtypes = {"param_dtype": "bfloat16"}
        return small_run(tmp_path / name, optimizer=optimizer, compute=dtypes, **ONE_LAYER, **changes)

    assert train(run("whole")) == loop.FINISHED
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / str(step))
    assert train(run("resumed")) == loop.FINISHED
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    assert bits_of(tmp_path / "resumed", 6) == bits_of(tmp_path / "whole", 6)
    assert "vanished_updates" not in lines(tmp_path / "whole")[0]
    record = export(tmp_path / "whole", tmp_path / "hf")
    assert record["dtype"] == "bfloat16" and not any(check["passed"] is False for check in record["checks"])
    with pytest.raises(ValueError, match=f"optimizer.rounding is nearest, but the run in .* was started with {rounding}"):
        train(small_run(tmp_path / "resumed", compute={"param_dtype": "bfloat16"}, train__steps=8, **ONE_LAYER))


@pytest.mark.slow
def test_updates_that_vanish_are_counted_and_named(tmp_path, small_run, capsys):
    optimizer = {"name": "adamw", "learning_rate": 1e-5}
    changes = {"compute": {"param_dtype": "bfloat16"}, "train__steps": 2, **ONE_LAYER}
    assert train(small_run(tmp_path, optimizer=optimizer, **changes)) == loop.FINISHED
    assert all(line["vanished_updates"] > 0.5 for line in lines(tmp_path))
    assert capsys.readouterr().err.count("of the weights as they are, since their updates are too small for bfloat16") == 1


# --- spikes of the loss ------------------------------------------------------------------------------------------------


@pytest.fixture
def spike(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, small_run, tmp_path: Path) -> None:
    """The loss of the batch of step 8, or of other steps, is five times what it would be, as of broken records."""
    run = small_run(tmp_path)
    loader = Loader(run.data, "train", load_tokenizer(run.data.tokenizer), BatchRows(8, 32), seed=0)
    marks = np.stack([loader.batch(step - 1).tokens[0] for step in getattr(request, "param", (8,))])
    plain = next_token.loss

    def loss(inputs, of_step):
        terms = plain(inputs, of_step)
        first = jax.sharding.reshard(inputs.batch.tokens, jax.sharding.PartitionSpec())[0]
        return terms._replace(sum=jnp.where(jnp.any(jnp.all(first == marks, axis=1)), 5.0, 1.0) * terms.sum)

    monkeypatch.setattr(next_token, "loss", loss)


def guarded(run_dir: Path, small_run: Callable[..., config.Config], **changes: Any) -> config.Config:
    guard = {"window": 4, "factor": 8.0, **changes}
    settings = {"every_steps": 3, "keep_last": 9}
    return small_run(run_dir, train__steps=12, train__spike_guard=guard, checkpoint=settings, **ONE_LAYER)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"action": "skip"}, {"action": "roll_back"}, {"action": "roll_back", "steps_back": 3}], ids=str
)
def test_a_spike_is_skipped_or_rolled_back_and_a_resume_does_the_same(tmp_path, small_run, spike, changes, capfd):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train(guarded(whole, small_run, **changes)) == loop.FINISHED
    error = capfd.readouterr().err
    assert error.count("step 8 skipped as a spike, 1 so far: loss") == 1
    assert [line["spikes"] for line in lines(whole)] == [0] * 7 + [1] * 5
    assert [line["step"] for line in lines(whole)] == list(range(1, 13))
    back = {"skip": 7, "roll_back": 6}[changes["action"]] if "steps_back" not in changes else 3
    # The schedule counts only updates that are kept.
    assert lines(whole)[-1]["skipped"] == 8 - back
    if changes["action"] == "roll_back":
        assert f"back to the checkpoint of step {back}, continuing with the data after step 8" in error
        assert (whole / "checkpoints" / "spike-6").exists() == (back == 3)
    # Killed between the spike and the next save, and once more after it.
    for kept in ({3, back if back != 7 else 6}, {3, 6, 9} if back != 3 else {3, 9}):
        shutil.rmtree(resumed, ignore_errors=True)
        shutil.copytree(whole, resumed)
        for step in set(steps_in(resumed)) - kept:
            shutil.rmtree(resumed / "checkpoints" / str(step))
        assert train(guarded(resumed, small_run, **changes)) == loop.FINISHED
        assert losses(resumed) == losses(whole)
        assert bits_of(resumed, 12) == bits_of(whole, 12)


@pytest.mark.slow
@pytest.mark.parametrize("spike", [(8, 10)], indirect=True)
def test_spikes_are_bounded_and_the_first_has_nothing_to_go_back_to(tmp_path, small_run, spike, capfd):
    run = guarded(tmp_path, small_run, action="roll_back", steps_back=9)
    assert train(run) == loop.FINISHED
    assert "there is no checkpoint before step 8 to roll back to, so it is only skipped" in capfd.readouterr().err
    shutil.rmtree(tmp_path)
    low = guarded(tmp_path, small_run, action="skip", max_events=1)
    with pytest.raises(RuntimeError, match=r"2 steps were spikes, the last one step \d+, and train.spike_guard.max_events is 1"):
        train(low)
    assert events(tmp_path)[-1]["reason"].startswith("RuntimeError: 2 steps were spikes")


@pytest.mark.slow
def test_masters_follow_float32_at_a_small_learning_rate(tmp_path, small_run):
    """39 steps at 1e-5, after which the loss on the same held-out data has fallen by nearly as much."""
    falls = {}
    for name, dtype, rounding in (
        ("float32", "float32", "nearest"),
        ("masters", "bfloat16", "float32_master"),
        ("stochastic", "bfloat16", "stochastic"),
        ("nearest", "bfloat16", "nearest"),
    ):
        optimizer = {"name": "adamw", "learning_rate": 1e-5, "rounding": rounding}
        changes = {"model__num_layers": 1, "mesh": {"data": 8}, "evaluation__every_steps": 39}
        run = small_run(
            tmp_path / name, optimizer=optimizer, compute={"param_dtype": dtype}, train__steps=39, checkpoint={}, **changes
        )
        assert train(run) == loop.FINISHED
        before, after = (line["loss"] for line in lines(tmp_path / name, "eval"))
        falls[name] = before - after
    assert falls["masters"] == pytest.approx(falls["float32"], rel=0.15), falls
    assert falls["stochastic"] == pytest.approx(falls["float32"], rel=0.3), falls
    assert falls["nearest"] < 0.7 * falls["float32"], falls
