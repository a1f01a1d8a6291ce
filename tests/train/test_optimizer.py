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
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import parameters
from moe_train.model.transformer import init_model
from moe_train.train.muon import matrix_dims, orthogonalise
from moe_train.train.optimizer import decay_mask, make_optimizer, make_schedule

MODEL = config.Model(
    family="mixtral",
    vocab_size=32,
    model_dim=16,
    num_layers=2,
    attention=config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8),
    ffn=config.MoeFfn(name="moe", ffn_dim=24, num_experts=4, experts_per_token=2),
)
LORA = config.Lora(targets=(config.LoraTarget(modules=("*",), rank=2, alpha=4.0),))
OPTIMIZERS = {
    "adamw": config.AdamW(name="adamw", learning_rate=1e-2, weight_decay=0.1),
    "lion": config.Lion(name="lion", learning_rate=1e-2, weight_decay=0.1),
    "adafactor": config.Adafactor(name="adafactor", learning_rate=1e-2, weight_decay=0.1, min_dim_size_to_factor=8),
    "muon": config.Muon(name="muon", learning_rate=1e-2, adamw_learning_rate=1e-3, weight_decay=0.1),
}


@functools.cache
def shapes_of(lora: config.Lora | None) -> dict[str, jax.ShapeDtypeStruct]:
    """A small model's weights, stacked on layers and experts, with their specs."""
    with jax.set_mesh(make_mesh(config.Mesh(fsdp=2, expert=2, tensor=2))):
        return parameters(jax.eval_shape(lambda: init_model(0, MODEL, config.Compute(), lora)))[1]


def random_parameters(lora: config.Lora | None = None) -> dict[str, np.ndarray]:
    rng, shapes = np.random.default_rng(0), shapes_of(lora)
    return {path: rng.normal(size=x.shape).astype(np.float32) for path, x in shapes.items()}


def gradients(step: int, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step + 1)
    return {path: rng.normal(size=params[path].shape).astype(np.float32) for path in sorted(params)}


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
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        yield


# --- references ----------------------------------------------------------------------------------------------------


def clipped(grads: dict[str, np.ndarray], limit: float) -> dict[str, np.ndarray]:
    norm = math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in grads.values()))
    return {path: g.astype(np.float64) * min(1, limit / norm) for path, g in grads.items()}


def adam(m, v, g, t, b1, b2, eps):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    return m, v, (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)


def newton_schulz(x: np.ndarray, steps: int) -> np.ndarray:
    """https://kellerjordan.github.io/posts/muon, one matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x / (np.linalg.norm(x) + 1e-8)
    y = y.T if x.shape[0] > x.shape[1] else y
    for _ in range(steps):
        s = y @ y.T
        y = a * y + (b * s + c * s @ s) @ y
    return y.T if x.shape[0] > x.shape[1] else y


def as_matrices(path: str, x: np.ndarray) -> np.ndarray:
    """(number of matrices, inputs, outputs): written out by hand for each kind of weight."""
    L, E, D, N, H, F = 2, 4, 16, x.shape[-2], 8, 24
    if path.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
        return x.reshape(L, D, N * H)
    if path.endswith("o_proj.weight"):
        return x.reshape(L, 4 * H, D)
    return x.reshape(L * E, *((F, D) if path.endswith("down_proj.weight") else (D, F)))


def is_matrix(path: str) -> bool:
    return ".attention." in path or (".ffn." in path and ".router." not in path)


def decays(path: str) -> bool:
    return "norm" not in path


def reference(section: config.Optimizer, params: dict[str, np.ndarray], steps: int = 3) -> dict[str, np.ndarray]:
    params = {path: x.astype(np.float64) for path, x in params.items()}
    m, v = ({path: np.zeros_like(x) for path, x in params.items()} for _ in range(2))
    for i in range(steps):
        grads = clipped(gradients(i, params), section.max_grad_norm)
        for path, g in grads.items():
            x, rate = params[path], section.learning_rate
            match section:
                case config.AdamW():
                    m[path], v[path], u = adam(m[path], v[path], g, i + 1, section.b1, section.b2, section.eps)
                case config.Lion():
                    u = np.sign(section.b1 * m[path] + (1 - section.b1) * g)
                    m[path] = section.b2 * m[path] + (1 - section.b2) * g
                case config.Muon() if is_matrix(path):
                    m[path] = section.momentum * m[path] + g
                    matrices = as_matrices(path, g + section.momentum * m[path])
                    scale = math.sqrt(max(1, matrices.shape[2] / matrices.shape[1]))
                    u = scale * np.stack([newton_schulz(one, section.ns_steps) for one in matrices]).reshape(g.shape)
                case config.Muon():
                    rate = section.adamw_learning_rate
                    m[path], v[path], u = adam(m[path], v[path], g, i + 1, section.b1, section.b2, section.eps)
            params[path] = x - rate * (u + section.weight_decay * x * decays(path))
    return params


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


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


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
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        wanted = run(OPTIMIZERS[name], on_one_device(params))
    mesh = make_mesh(config.Mesh(fsdp=2, expert=2, tensor=2))
    with jax.set_mesh(mesh):
        shapes = shapes_of(LORA)
        assert any(x.sharding.spec == P(None, "expert", "fsdp", "tensor") for x in shapes.values())
        split = {path: jax.device_put(x, NamedSharding(mesh, shapes[path].sharding.spec)) for path, x in params.items()}
        found = run(OPTIMIZERS[name], split)
    for path in params:
        assert relative(found[path] - params[path], wanted[path] - params[path]) < 1e-4, path


@pytest.mark.parametrize("sizes", [config.Mesh(fsdp=2, expert=2, tensor=2), config.Mesh(fsdp=4, tensor=2)], ids=str)
def test_muon_orthogonalises_each_layer_and_expert(sizes):
    """Also where the two layers cannot be dealt out to all devices that share a layer's matrices (fsdp 4)."""
    path, mesh = "stacks.0.layers.0.ffn.gate_proj.weight", make_mesh(sizes)
    x = np.random.default_rng(0).normal(size=(2, 4, 16, 24)).astype(np.float32)
    x[1, 2] *= 1e3  # a matrix's size is nobody else's business
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, P(None, "expert", "fsdp", "tensor")))
        y = jax.jit(lambda x: orthogonalise({path: x}, 5))(split)[path]
        assert y.sharding.spec == P(None, "expert", "fsdp", "tensor")
    wanted = np.stack([[newton_schulz(m.astype(np.float64), 5) for m in layer] for layer in x]) * math.sqrt(24 / 16)
    assert relative(np.asarray(y), wanted) < 1e-4
    assert np.all(np.linalg.svd(wanted / math.sqrt(24 / 16))[1] > 0.3)


def test_muon_takes_matrices_by_name():
    params = random_parameters(LORA)
    taken = {path for path in params if matrix_dims(path)}
    assert taken == {path for path in params if is_matrix(path)}
    for path in taken:  # every dim that is not layers or experts is of the matrix
        inputs, outputs = matrix_dims(path)
        lead = 2 if ".ffn." in path else 1
        assert sorted(dim % params[path].ndim for dim in (*inputs, *outputs)) == list(range(lead, params[path].ndim)), path


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
