"""Runs with adapters of every kind: what is trained, what stays, how routing drifts, and how an adapter is continued."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.checkpoint import model_dir, runs
from moe_train.commands import write_and_prove
from moe_train.commands.compare_adapters import diff
from moe_train.commands.export import export
from moe_train.commands.train import train
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import parameters
from moe_train.model.transformer import abstract_model, init_model
from moe_train.run import loop
from tests.run_dir import lines

MIXTRAL = {
    "family": "mixtral",
    "vocab_size": 288,
    "model_dim": 32,
    "num_layers": 2,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "ffn": {"name": "moe", "ffn_dim": 16, "num_experts": 4, "experts_per_token": 2},
    "max_seq_len": 64,
    "init_stddev": 0.1,
}
LORA: dict[str, Any] = {
    "targets": [
        {"modules": ["attention.*", "embed"], "rank": 2, "alpha": 4.0},
        {"modules": ["ffn.*_proj"], "rank": 3, "alpha": 6.0, "experts": [0, 2]},
        {"modules": ["ffn.*_proj"], "rank": 2, "alpha": 6.0, "experts": [3]},
    ],
    "dropout": 0.1,
    "train": ["ffn.router", "final_norm"],
}


@pytest.fixture(scope="module")
def base(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Mixtral of random weights, in Hugging Face's files."""
    directory = tmp_path_factory.mktemp("base") / "model"
    model = config.Model.model_validate_json(json.dumps(MIXTRAL))
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        weights = parameters(init_model(0, model, config.Compute()))[1]
        write_and_prove.export_model(weights, model, directory, write_and_prove.WriteOptions(dtype="float32"))
    return directory


@pytest.fixture(scope="module")
def adapted(base: Path, small_run: Callable[..., config.Config], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run") / "lora"
    assert train(make(small_run, run_dir, base)) == loop.FINISHED
    return run_dir


def make(small_run: Callable[..., config.Config], run_dir: Path, base: Path, **changes: Any) -> config.Config:
    settings = {
        "init_from": str(base),
        "model": None,
        "lora": LORA,
        "loss": {"load_balance_loss_coef": 0.01, "router_z_loss_coef": 0.0},
        "mesh": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
        "train__steps": 4,
        "train__microbatches": 2,
    }
    return small_run(run_dir, **(settings | changes))


def weights_of(directory: Path, run: config.Run, lora: config.Lora | None) -> dict[str, np.ndarray]:
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        shapes = parameters(abstract_model(run.model, run.compute, lora))[1]
        return jax.device_get(model_dir.load_parameters(directory, shapes))


def test_what_is_trained_and_what_stays(adapted: Path, base: Path) -> None:
    run = runs.read_run(adapted)
    before, after = weights_of(base, run, None), weights_of(adapted, run, run.lora)
    changed = {path for path, x in before.items() if not np.array_equal(x, after[path])}
    assert changed == {"stacks.0.layers.0.ffn.router.weight", "final_norm.scale"}  # all others to the last bit
    for name, filled in (("gate_proj", (3, 0, 3, 2)), ("down_proj", (3, 0, 3, 2))):
        a, b = (after[f"stacks.0.layers.0.ffn.{name}.lora_{x}"] for x in "ab")
        for e, rank in enumerate(filled):
            assert not a[:, e, :, rank:].any() and not b[:, e, rank:].any()  # past its rank an expert stays zero
            assert rank == 0 or (a[:, e, :, :rank].all() and b[:, e, :rank].any(axis=(1, 2)).all())
    assert after["embed.lora_a"].any() and after["embed.lora_b"].all()


def test_routing_drifts_from_the_base(adapted: Path) -> None:
    first, *_, last = lines(adapted, "eval")
    assert first["routing_drift"] == [0, 0]  # a fresh adapter changes nothing
    assert all(0 < drift < 1 for drift in last["routing_drift"]) and last["loss"] < first["loss"]
    assert all(0 <= dead < 1 for dead in last["dead_experts"])


def test_how_far_it_moved(adapted: Path) -> None:
    found = diff(adapted)
    assert all(row[1] == 0 and min(row[0], row[2], row[3]) > 0 for row in found.experts())  # expert 1 has no adapter
    assert {m.module for m in found.changes if m.delta} >= {"ffn.router", "final_norm", "embed", "attention.q_proj", "ffn.up_proj"}


@pytest.mark.slow
def test_an_adapter_is_continued(adapted: Path, base: Path, small_run: Callable[..., config.Config], tmp_path: Path) -> None:
    """From a run and from the files that it exports: the same loss at once; its targets, where none are stated."""
    export(adapted, tmp_path / "peft", "peft")
    wanted = lines(adapted, "eval")[-1]
    for source in (adapted, tmp_path / "peft"):
        lora = {"init_from": str(source), "dropout": 0.1}
        run = make(small_run, tmp_path / f"from_{source.name}", base, lora=lora, train__steps=1)
        assert train(run) == loop.FINISHED
        first = lines(Path(run.run_dir), "eval")[0]
        assert first["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert first["routing_drift"] == pytest.approx(wanted["routing_drift"], abs=0.01)  # near-ties may fall otherwise
        said = runs.read_run(run.run_dir).lora
        assert said is not None and said.targets and set(said.train) == {"ffn.router", "final_norm"}
    assert train(make(small_run, Path(run.run_dir), base, lora=lora, train__steps=2)) == loop.FINISHED  # resumed
    assert [line["step"] for line in lines(Path(run.run_dir), "train")] == [1, 2]
    weights = tmp_path / "peft/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"the adapter in .*peft has changed since this run was started"):
        train(make(small_run, Path(run.run_dir), base, lora=lora, train__steps=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"targets": [{"modules": ["attention.*"], "rank": 4, "alpha": 8.0}]},
            r"lora.targets gives attention.k_proj rank 4, scale 2, but the adapter in .* has rank 2, scale 2; leave targets out",
        ),
        ({"train": ["ffn.router"]}, "lora.train does not name final_norm, but .* contains trained weights of it"),
    ],
)
def test_an_adapter_that_is_another(
    changes: dict[str, Any], message: str, adapted: Path, base: Path, small_run: Callable[..., config.Config], tmp_path: Path
) -> None:
    run = make(small_run, tmp_path / "run", base, lora={"init_from": str(adapted), **changes})
    with pytest.raises(ValueError, match=message):
        train(run)
    assert not (tmp_path / "run").exists()


def test_a_trained_router_wants_its_coefficients(small_run: Callable[..., config.Config], base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"state loss.load_balance_loss_coef, loss.router_z_loss_coef, since routers are trained"):
        train(make(small_run, tmp_path / "run", base, loss={}))
    frozen = LORA | {"train": ["final_norm"]}
    with pytest.raises(ValueError, match=r"evaluation\.drift_batches is 2, but only adapters"):
        train(small_run(tmp_path / "run", evaluation={"drift_batches": 2}))
    config.check_model(make(small_run, tmp_path / "run", base, loss={}, lora=frozen), config.Model.model_validate(MIXTRAL))
