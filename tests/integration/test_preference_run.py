"""Runs that learn from judged answers: the start, the rewards, stored references, resumption, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.commands.prepare import prepare
from moe_train.commands.train import train
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import parameters
from moe_train.model.transformer import init_model
from moe_train.run import loop
from tests.integration.test_lora_run import MIXTRAL
from tests.run_dir import lines

MODEL = MIXTRAL | {"max_seq_len": 512}
LORA = {"targets": [{"modules": ["attention.*", "ffn.*"], "rank": 2, "alpha": 8.0}]}
WORDS = "red blue green one two three".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Mixtral of random weights, in Hugging Face's files."""
    directory = tmp_path_factory.mktemp("base") / "model"
    model = config.Model.model_validate_json(json.dumps(MODEL))
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        weights = parameters(init_model(0, model, config.Compute()))[1]
        write_and_prove.export_model(weights, model, directory, write_and_prove.WriteOptions(dtype="float32"))
    return directory


@pytest.fixture(scope="module")
def make(base: Path, small_run: Callable[..., config.Config], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A run of 4 steps on judged answers, with adapters unless stated."""
    folder = tmp_path_factory.mktemp("judged")
    rng = np.random.default_rng(0)
    pairs = []
    labelled = []
    for _ in range(24):
        prompt, good, bad = (" ".join(rng.choice(WORDS, n)) for n in (3, 2, 4))
        pairs.append({"prompt": prompt, "chosen": good, "rejected": bad + " no"})
        labelled.append({"prompt": prompt, "completion": good, "label": True})
        labelled.append({"prompt": prompt, "completion": bad, "label": False})
    for name, records in (("pairs", pairs), ("labelled", labelled)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def make(run_dir: Path, objective: dict[str, Any], **changes: Any) -> config.Config:
        name, record = ("pairs", "preference") if objective["name"] == "preference" else ("labelled", "labelled")
        source = {"name": "files", "files": [str(folder / f"{name}.jsonl")], "record": {"name": record}}
        settings = {
            "init_from": str(base),
            "model": None,
            "lora": LORA,
            "objective": objective,
            "loss": {"load_balance_loss_coef": 0.0, "router_z_loss_coef": 0.0},
            "mesh": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
            "data__train": [source],
            "data__eval": [source],
            "train__seq_len": 128,
            "train__steps": 4,
            "train__microbatches": 2,
            "metrics__every_steps": 1,
        }
        return small_run(run_dir, **(settings | changes))

    return make


def test_pairs_with_adapters_start_at_zero_and_learn(
    make: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(make(tmp_path / "run", {"name": "preference", "beta": 0.5})) == loop.FINISHED
    said = capfd.readouterr().err
    assert "start check: rewards are 0 and the loss is 0.6931, as expected" in said
    assert "objective: preference, sigmoid, beta 0.5, compared with the model without its adapters" in said
    assert "pairs: both answers attend to one prompt, which routers count once (objective.shared_prompt true)" in said
    assert "shared_prompt: true" in (tmp_path / "run" / "config.yaml").read_text()
    steps = lines(tmp_path / "run")
    assert steps[0]["rewards/margins"] == 0 and steps[0]["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert steps[-1]["rewards/margins"] > 0 and steps[-1]["loss"] < steps[0]["loss"]
    assert steps[0]["routing_drift"] == [0, 0] and all(0 < drift < 1 for drift in steps[-1]["routing_drift"])
    held_out = lines(tmp_path / "run", "eval")
    assert held_out[-1]["rewards/accuracies"] > 0.5 and held_out[0]["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert held_out[0]["pairs"] == 24 and held_out[0]["routing_drift"] == [0, 0] and len(held_out[-1]["routing_drift"]) == 2


@pytest.mark.slow
def test_labelled_answers_with_adapters(make: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    objective = {"name": "unpaired_preference", "beta": 0.5, "desirable_weight": 2.0}
    assert train(make(tmp_path / "run", objective)) == loop.FINISHED
    assert "start check: rewards are 0" in capfd.readouterr().err
    steps = lines(tmp_path / "run")
    # As many good answers as bad ones in the whole, but not in each batch.
    assert steps[0]["rewards/margins"] == steps[0]["kl"] == 0 and 0.5 < steps[0]["loss"] < 1
    held_out = lines(tmp_path / "run", "eval")
    assert held_out[0]["answers"] == 48 and held_out[0]["loss"] == pytest.approx(0.75)
    assert held_out[-1]["rewards/margins"] > 0 and held_out[-1]["loss"] < held_out[0]["loss"]


@pytest.mark.slow
def test_full_training_stores_its_reference_and_resumes_with_it(
    make: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    full = {"lora": None, "data__cache_dir": str(cache), "optimizer__learning_rate": 1e-3}
    run = make(tmp_path / "run", {"name": "preference", "beta": 0.5, "sft_weight": 0.1}, **full)
    assert train(run.model_copy(update={"train": run.train.model_copy(update={"steps": 2})})) == loop.FINISHED
    said = capfd.readouterr().err
    assert "computing the reference log-probabilities of" in said and "start check: rewards are 0" in said
    first = lines(tmp_path / "run")[0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    # Stored in other rows, where two experts that are equally good may change places.
    assert len(first["routing_drift"]) == 2 and max(first["routing_drift"]) < 0.01
    assert all(drift < 0.01 for drift in lines(tmp_path / "run", "eval")[0]["routing_drift"])
    stored = sorted(cache.rglob("reference-*"))
    assert len(stored) == 1  # training and held-out data are the same set
    # A resumed run reads what is stored, and computes it again from init_from where it is gone.
    shutil.rmtree(stored[0])
    assert train(run) == loop.FINISHED
    said = capfd.readouterr().err
    assert "computing the reference" in said and "start check" not in said
    steps = lines(tmp_path / "run")
    assert len(steps) == 4 and steps[-1]["rewards/margins"] > 0.01
    assert 0 < max(steps[-1]["routing_drift"]) < 1 and len(lines(tmp_path / "run", "eval")[-1]["routing_drift"]) == 2
    # What `data prepare --reference` stores is what the run would have computed, and is read in its place.
    values = (sorted(cache.rglob("reference-*/logprobs"))[0]).read_bytes()
    shutil.rmtree(stored[0])
    prepare(run, with_reference=True)
    np.testing.assert_allclose(*(np.frombuffer(x, np.float32) for x in (values, (stored[0] / "logprobs").read_bytes())), atol=1e-5)
    # With adapters on the same data nothing is stored, and the values at the start are the same.
    adapted = make(tmp_path / "adapted", {"name": "preference", "beta": 0.5, "sft_weight": 0.1}, data__cache_dir=str(cache))
    assert train(adapted) == loop.FINISHED
    assert lines(tmp_path / "adapted")[0]["loss"] == pytest.approx(first["loss"], rel=1e-5)
    with pytest.raises(ValueError, match="starts from random weights; state init_from"):
        train(make(tmp_path / "random", {"name": "preference"}, **full, init_from=None, model=MODEL))


def test_what_does_not_fit_the_objective_is_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"objective next_token reads records of kind .*, not labelled"):
        make(tmp_path / "run", {"name": "next_token"})
    short = make(tmp_path / "run", {"name": "preference"}, train__seq_len=32)
    with pytest.raises(ValueError, match=r"pairs\.jsonl:\d+: the record has \d+ tokens, train.seq_len is 32"):
        train(short)
    one_class = tmp_path / "good.jsonl"
    one_class.write_text("".join(json.dumps({"prompt": f"p{n}", "completion": "a", "label": True}) + "\n" for n in range(4)))
    source = {"name": "files", "files": [str(one_class)], "record": {"name": "labelled"}}
    run = make(tmp_path / "run", {"name": "unpaired_preference"}, data__train=[source], data__eval=[])
    with pytest.raises(ValueError, match=r"good\.jsonl:1: .*labelled good, so nothing tells good from bad; add records"):
        train(run)
