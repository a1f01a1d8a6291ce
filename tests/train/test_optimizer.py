"""Optimizers against plain numpy, and on a mesh against one device."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.train.optimizer import decay_mask, make_optimizer, make_schedule, peak_rates
from tests.meshes import mesh_of
from tests.train.optimizer_reference import LORA, clipped, decays, gradients, random_parameters, reference, relative, shapes_of

OPTIMIZERS = {
    "adamw": config.AdamW(name="adamw", learning_rate=1e-2, weight_decay=0.1),
    "lion": config.Lion(name="lion", learning_rate=1e-2, weight_decay=0.1),
    "adafactor": config.Adafactor(name="adafactor", learning_rate=1e-2, weight_decay=0.1, min_dim_size_to_factor=8),
    "muon": config.Muon(name="muon", learning_rate=1e-2, adamw_learning_rate=1e-3, weight_decay=0.1),
}


def run(section: config.Optimizer, params: dict, steps: int = 3, total: int = 10) -> dict[str, np.ndarray]:
    """Weights after some steps on random gradients, with the shardings of `params`."""
    optimizer = make_optimizer(section, total)
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        grads = {path: jax.device_put(g, params[path].sharding) for path, g in gradients(i, params).items()}
        params, state = step(params, state, grads)
    return {path: np.asarray(x) for path, x in params.items()}


def on_one_device(params: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {path: jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), P())) for path, x in params.items()}


@pytest.fixture
def one_device():
    with jax.set_mesh(mesh_of(config.Mesh())):
        yield


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_equals_plain_numpy(one_device, name):
    params = random_parameters()
    found, wanted = run(OPTIMIZERS[name], on_one_device(params)), reference(OPTIMIZERS[name], params)
    for path in params:
        assert relative(found[path] - params[path], wanted[path] - params[path]) < 2e-4, path


def test_adafactor_equals_plain_numpy(one_device):
    """arXiv:1804.04235, algorithms 4 and 5, on one matrix and one vector."""
    params = {"head.weight": random_parameters()["head.weight"], "final_norm.scale": random_parameters()["final_norm.scale"]}
    section = OPTIMIZERS["adafactor"]
    found = run(section, on_one_device(params))
    x = {path: p.astype(np.float64) for path, p in params.items()}
    rows, columns, v = 0.0, 0.0, 0.0
    for i in range(3):
        g = clipped(gradients(i, params), 1.0)
        b2 = 1 - (i + 1) ** -section.decay_rate
        square = {path: np.square(value) + 1e-30 for path, value in g.items()}
        rows = b2 * rows + (1 - b2) * square["head.weight"].mean(axis=1)
        columns = b2 * columns + (1 - b2) * square["head.weight"].mean(axis=0)
        v = b2 * v + (1 - b2) * square["final_norm.scale"]
        u = {
            "head.weight": g["head.weight"] / np.sqrt(np.outer(rows, columns) / rows.mean()),
            "final_norm.scale": g["final_norm.scale"] / np.sqrt(v),
        }
        for path in x:
            step = u[path] / max(1, np.sqrt(np.mean(np.square(u[path])))) * max(1e-3, np.sqrt(np.mean(np.square(x[path]))))
            x[path] -= section.learning_rate * (step + section.weight_decay * x[path] * decays(path))
    for path in x:
        assert relative(found[path] - params[path], x[path] - params[path]) < 2e-4, path


# --- meshes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_mesh_equals_one_device(name):
    """Weights split over fsdp 2, expert 2, tensor 2, adapters among them."""
    kinds = (
        "embed.weight",
        "q_proj.weight",
        "q_proj.lora_b",
        "o_proj.weight",
        "o_proj.lora_a",
        "gate_proj.weight",
        "down_proj.lora_b",
    )
    params = {path: x for path, x in random_parameters(LORA).items() if path.endswith(kinds)}
    with jax.set_mesh(mesh_of(config.Mesh())):
        wanted = run(OPTIMIZERS[name], on_one_device(params))
    mesh = mesh_of(config.Mesh(fsdp=2, expert=2, tensor=2))
    with jax.set_mesh(mesh):
        shapes = shapes_of(LORA)
        assert any(x.sharding.spec == P(None, "expert", "fsdp", "tensor") for x in shapes.values())
        split = {path: jax.device_put(x, NamedSharding(mesh, shapes[path].sharding.spec)) for path, x in params.items()}
        found = run(OPTIMIZERS[name], split)
    for path in params:
        assert relative(found[path] - params[path], wanted[path] - params[path]) < 1e-4, path


# --- masks, clipping, schedules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("no_decay", "spared"),
    [
        ((), ()),
        (("norms",), ("attention_norm.scale", "ffn_norm.scale", "final_norm.scale")),
        (("router", "embeddings"), ("router.weight", "embed.weight", "head.weight")),
    ],
)
def test_decay_masks(no_decay, spared):
    mask = decay_mask(random_parameters(), no_decay)
    assert {path for path, decays in mask.items() if not decays} == {path for path in mask if path.endswith(spared) and spared}


def test_clips_the_global_norm(one_device):
    section = config.AdamW(name="adamw", learning_rate=1.0, b1=0.0, b2=0.0, eps=1e3)  # with a large eps: update = g / eps
    params = on_one_device({"a": np.zeros(3, np.float32), "b": np.zeros(1, np.float32)})
    grads = {"a": jnp.array([3.0, 0, 0]), "b": jnp.array([4.0])}
    for limit, wanted in ((1.0, 0.6e-3), (None, 3e-3), (10.0, 3e-3)):
        optimizer = make_optimizer(section.model_copy(update={"max_grad_norm": limit}), 10)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        assert abs(float(updates["a"][0])) == pytest.approx(wanted, rel=5e-3)


def test_skipped_steps_do_not_move_the_schedule(one_device):
    """The optimizer's own count moves with its state, which a skipped step keeps."""
    optimizer = make_optimizer(OPTIMIZERS["adamw"], 10)
    params = on_one_device({"a": np.ones(3, np.float32)})
    counts = [x for path, x in jax.tree_util.tree_leaves_with_path(optimizer.init(params)) if "count" in str(path)]
    assert [int(c) for c in counts] == [0, 0]


TOTAL = 20


def plain_rate(schedule: config.Schedule, i: int) -> float:
    """The rate of step i in words: warm up to 1, then fall to the final fraction, reached at the last step."""
    warm = schedule.warmup_steps
    if i < warm:
        return (i + 1) / warm
    done = (i - max(warm - 1, 0)) / (TOTAL - 1 - max(warm - 1, 0))
    match schedule:
        case config.ConstantSchedule():
            return 1.0
        case config.CosineSchedule(final_fraction=f):
            return f + (1 - f) * (1 + math.cos(math.pi * done)) / 2
        case config.LinearSchedule(final_fraction=f):
            return 1 - (1 - f) * done
        case config.WsdSchedule(final_fraction=f, decay_steps=d):
            return 1 - (1 - f) * max(0, (i - (TOTAL - 1 - d)) / d)


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize(
    "schedule",
    [
        config.ConstantSchedule(name="constant"),
        config.CosineSchedule(name="cosine"),
        config.LinearSchedule(name="linear", final_fraction=0.2),
        config.WsdSchedule(name="wsd", decay_steps=6),
    ],
    ids=lambda s: s.name,
)
def test_schedules(schedule, warmup):
    schedule = schedule.model_copy(update={"warmup_steps": warmup})
    rate = make_schedule(schedule, 3e-4, TOTAL)
    assert [float(rate(i)) for i in range(TOTAL)] == pytest.approx(
        [3e-4 * plain_rate(schedule, i) for i in range(TOTAL)], rel=1e-5, abs=1e-10
    )


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (config.CosineSchedule(name="cosine", warmup_steps=21), "warmup_steps 21 exceed the 20 steps"),
        (config.WsdSchedule(name="wsd", warmup_steps=10, decay_steps=11), "warmup_steps 10 and decay_steps 11 exceed the 20 steps"),
    ],
)
def test_a_schedule_longer_than_the_run_is_refused(schedule, said):
    with pytest.raises(ValueError, match=said):
        make_schedule(schedule, 1e-3, TOTAL)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear"])
def test_a_run_of_one_step_has_its_peak(name):
    section = {"constant": config.ConstantSchedule, "cosine": config.CosineSchedule, "linear": config.LinearSchedule}[name](
        name=name
    )
    assert float(make_schedule(section, 1e-3, 1)(0)) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "section",
    [
        config.AdamW(name="adamw", learning_rate=1e-3),
        pytest.param(config.Muon(name="muon", learning_rate=1e-2, adamw_learning_rate=1e-3), marks=pytest.mark.slow),
        config.AdamW(name="adamw", learning_rate=1e-3, rounding="stochastic"),
    ],
    ids=lambda section: f"{section.name} {section.rounding}",
)
def test_learning_rates_as_arguments(one_device, section: config.Optimizer) -> None:
    """The program is the same for other learning rates, and its results are those of the constants."""
    weights = on_one_device(random_parameters())
    slopes = jax.tree.map(lambda x: 0.1 * x, weights)
    rates = {part: 2 * rate for part, rate in peak_rates(section).items()}
    doubled = section.model_copy(update={"learning_rate": 2 * section.learning_rate})
    if isinstance(section, config.Muon):
        doubled = doubled.model_copy(update={"adamw_learning_rate": 2 * section.adamw_learning_rate})

    def update(stated: config.Optimizer, rates: dict | None) -> dict:
        optimizer = optax.with_extra_args_support(make_optimizer(stated, total_steps=10))
        return optimizer.update(slopes, optimizer.init(weights), weights, learning_rates=rates)[0]

    for path, expected in update(doubled, None).items():
        np.testing.assert_allclose(update(section, rates)[path], expected, rtol=1e-6)
    programs = {str(jax.make_jaxpr(functools.partial(update, stated))(rates)) for stated in (section, doubled)}
    assert len(programs) == 1
