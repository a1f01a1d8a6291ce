"""A sparse model whose first two layers are dense: trained, resumed, adapted, generated from, planned and inspected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moe_train import config
from moe_train.checkpoint import model_dir
from moe_train.commands.export import export
from moe_train.commands.inspect import inspect
from moe_train.commands.plan import plan_run
from moe_train.commands.train import train
from moe_train.data.batches.batch import Batch
from moe_train.evaluate.generate import GenerationOptions, generate_tokens
from moe_train.machine.mesh import make_mesh, put_batch
from moe_train.model.flops import flops_per_token
from moe_train.model.parameters import combine, parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.transformer import abstract_model
from moe_train.plan.answer import PlanOptions
from moe_train.run import loop
from moe_train.train.optimizer import make_optimizer
from moe_train.train.state import create_state
from moe_train.train.step import train_step
from moe_train.train.step_definition import definition_of

D, V, L, DENSE = 32, 288, 4, 2
FFN = {
    **{"name": "moe", "ffn_dim": 16, "num_experts": 4, "experts_per_token": 2, "router": {"name": "sigmoid", "bias": True}},
    **{"num_shared_experts": 1, "dense_layers": {"count": DENSE, "ffn_dim": 48}},
}
LOSS = {"load_balance_loss_coef": 0.01, "router_z_loss_coef": 0.001, "bias_update_rate": 0.01}
MESH = {"fsdp": 2, "expert": 2, "tensor": 2}
LORA = {
    "targets": [
        {"modules": ["attention.q_proj", "ffn.gate_proj"], "rank": 2, "alpha": 4.0},
        {"modules": ["ffn.down_proj"], "rank": 3, "alpha": 6.0, "experts": [0, 2]},
    ],
    "dropout": 0.1,
}


@pytest.fixture(scope="module")
def make(small_run: Callable[..., config.Config]) -> Callable[..., config.Config]:
    changes = {"model__family": "mixtral", "model__num_layers": L, "model__ffn": FFN, "export": "none", "mesh": MESH}
    changes |= {"loss": LOSS, "train__steps": 4, "evaluation": {"every_steps": 4}}
    return lambda run_dir, **more: small_run(run_dir, **{**changes, **more})


@pytest.fixture(scope="module")
def trained(make: Callable[..., config.Config], tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    run = make(tmp_path_factory.mktemp("dense_first") / "run")
    assert train(run) == loop.FINISHED
    return run


def lines(run: config.Config, kind: str) -> list[dict[str, Any]]:
    found = map(json.loads, (Path(run.run_dir) / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def load(run: config.Config) -> tuple[Any, dict[str, jax.Array]]:
    """Structure and newest weights; the run's mesh is in force."""
    assert run.model is not None
    structure, shapes = parameters(abstract_model(run.model, run.compute, run.lora))
    return structure, model_dir.load_parameters(run.run_dir, shapes)


def test_it_trains_and_counts_its_sparse_layers(trained: config.Config) -> None:
    train = lines(trained, "train")
    assert train[-1]["loss"] < train[0]["loss"] - 0.3
    assert all(np.shape(line["load"]) == (L - DENSE, 4) for line in train)
    with jax.set_mesh(make_mesh(trained.mesh)):
        biases = {path: np.asarray(x) for path, x in load(trained)[1].items() if path.endswith(".bias")}
    assert list(biases) == ["stacks.1.layers.0.ffn.router.bias"]
    (bias,) = biases.values()
    assert bias.shape == (L - DENSE, 4) and np.any(bias[0] != bias[1]) and np.all(np.any(bias, axis=1))


def test_it_resumes_bit_for_bit(trained: config.Config, make: Callable[..., config.Config], tmp_path: Path) -> None:
    shutil.copytree(trained.run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    again = make(tmp_path / "run")
    assert train(again) == loop.FINISHED
    assert [line["loss"] for line in lines(again, "train")] == [line["loss"] for line in lines(trained, "train")]
    with jax.set_mesh(make_mesh(trained.mesh)):
        (_, found), (_, wanted) = load(again), load(trained)
    assert all(np.array_equal(found[path], x) for path, x in wanted.items())


@pytest.mark.slow
def test_adapters_reach_both_stacks(trained: config.Config, make: Callable[..., config.Config], tmp_path: Path) -> None:
    frozen = {key: value for key, value in LOSS.items() if key != "bias_update_rate"}
    run = make(tmp_path / "lora", init_from=trained.run_dir, lora=LORA, loss=frozen)
    assert train(run) == loop.FINISHED
    assert len(lines(run, "eval")[-1]["routing_drift"]) == L - DENSE
    with jax.set_mesh(make_mesh(run.mesh)):
        weights = load(run)[1]
    moved = {path for path, x in weights.items() if path.endswith(".lora_b") and np.any(x)}
    assert moved == {
        *(f"stacks.{stack}.layers.0.{module}.lora_b" for stack in (0, 1) for module in ("attention.q_proj", "ffn.gate_proj")),
        "stacks.1.layers.0.ffn.down_proj.lora_b",  # the target names experts, and so no dense layer
    }
    of_experts = np.any(np.asarray(weights["stacks.1.layers.0.ffn.down_proj.lora_b"]), axis=(2, 3))
    assert of_experts[:, [0, 2]].any(axis=1).all() and not of_experts[:, [1, 3]].any()
    with pytest.raises(ValueError, match=r"lora\.targets: attention\.q_proj has no experts; leave experts \[0\] out"):
        inspect(run.model_copy(update={"lora": config.Lora(targets=(_on_experts("attention.q_proj"),))}))


def _on_experts(module: str) -> config.LoraTarget:
    return config.LoraTarget(modules=(module,), rank=2, alpha=2.0, experts=(0,))


def test_a_cache_generates_what_the_model_says_without_one(trained: config.Config) -> None:
    prompt, count, mesh = list(range(3, 12)), 6, make_mesh(trained.mesh)
    assert trained.model is not None
    with jax.set_mesh(mesh):
        structure, weights = load(trained)
        (new,) = generate_tokens(structure, weights, trained.model, mesh, [prompt], GenerationOptions(count))
        rows = np.zeros((4, 16), np.int32)
        rows[0, : len(prompt) + count] = prompt + new
        positions = np.tile(np.arange(16, dtype=np.int32), (4, 1))
        tokens, positions, segments = put_batch((rows, positions, np.ones_like(rows)), mesh)
        run = jax.jit(lambda weights, *row: (model := combine(structure, weights)).logits(model(*row)[0]))
        logits = np.asarray(run(weights, tokens, positions, segments))[0]
    at = slice(len(prompt) - 1, len(prompt) - 1 + count)
    assert np.argmax(logits[at], axis=-1).tolist() == new
    assert np.diff(np.sort(logits[at], axis=-1)[:, -2:]).min() > 1e-4, "a tie: choose another prompt"


def test_it_is_inspected_and_planned(trained: config.Config) -> None:
    report = inspect(trained)
    rows = {row["path"]: row for row in report.parameters}
    assert rows["stacks.0.layers.0.ffn.gate_proj.weight"]["shape"] == [DENSE, D, 48]
    assert rows["stacks.1.layers.0.ffn.gate_proj.weight"]["shape"] == [L - DENSE, 4, D, 16]
    idle = (L - DENSE) * 2 * 3 * D * 16  # two of four experts
    assert report.totals["active_parameters"] == report.totals["total_parameters"] - idle
    answer = plan_run(trained, "v5e:2x4", PlanOptions(compile_best=0))
    assert answer.best is not None and answer.best.memory.total > 0


def test_its_flops_are_those_of_its_layers(trained: config.Config) -> None:
    assert trained.model is not None
    attention = 2 * D * 4 * 8 + 2 * D * 2 * 8
    sparse = 3 * D * 16 * (2 + 1) + D * 4
    weights = DENSE * (attention + 3 * D * 48) + (L - DENSE) * (attention + sparse) + V * D
    assert flops_per_token(trained.model, 32) == 6 * weights + 12 * L * 4 * 8 * 32 / 2


def test_it_is_not_exported(trained: config.Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file format can express .* and dense first layers"):
        export(trained.run_dir, tmp_path / "out")


def steps_on(mesh: jax.sharding.Mesh, run: config.Config) -> list[float]:
    """Losses of three steps on random tokens; the same initial weights on every mesh."""
    assert run.model is not None
    rng, length = np.random.default_rng(0), 16
    tokens = rng.integers(0, V, (8, length)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (8, 1))
    rows = Batch(tokens, np.roll(tokens, -1, 1), np.ones((8, length), bool), np.ones((8, length), np.int32), positions)
    with jax.set_mesh(mesh):
        structure, shapes = parameters(abstract_model(run.model, run.compute, run.lora))
        drawn = {path: draw_like(path, like, mesh) for path, like in shapes.items()}
        optimizer = make_optimizer(run.optimizer, 3)
        state = create_state(drawn, optimizer, run.lora)
        step = jax.jit(partial(train_step, definition_of(config.run_of(run), structure, optimizer)))
        losses = []
        for _ in range(3):
            state, metrics = step(state, put_batch(rows, mesh))
            losses.append(float(metrics.loss))
    return losses


def draw_like(path: str, like: Any, mesh: jax.sharding.Mesh) -> jax.Array:
    rng = np.random.default_rng(sum(map(ord, path)))
    values = rng.normal(float(ParameterPath.parse(path).is_norm), 0.2, like.shape).astype(like.dtype)
    return jax.device_put(jnp.asarray(values), NamedSharding(mesh, like.sharding.spec))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_eight_devices_lose_what_one_loses(make: Callable[..., config.Config], tmp_path: Path, lora: Any) -> None:
    loss = LOSS if lora is None else {key: value for key, value in LOSS.items() if key != "bias_update_rate"}
    run = make(tmp_path / "run", lora=lora, loss=loss)
    one, eight = steps_on(make_mesh(config.Mesh(), jax.devices()[:1]), run), steps_on(make_mesh(run.mesh), run)
    assert one == pytest.approx(eight, rel=1e-5) and one[-1] < one[0]
