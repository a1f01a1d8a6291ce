"""The MoE layer against a loop over experts in float64; routing, padding and the router's figures."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.machine.mesh import BATCH
from moe_train.model.moe import layer as moe
from moe_train.model.moe import router
from tests.tiny import EIGHT, ONE

B, T, D, F, E = 8, 6, 16, 24, 4
MESHES = {"one device": ONE, "fsdp, expert, tensor": EIGHT}
ROUTING = {  # experts per token, and what is added to the logits
    "random": (2, (0, 0, 0, 0)),
    "an empty expert": (2, (0, -50, 0, 0)),
    "two experts": (2, (-50, 0, 0, -50)),
    "skewed": (2, (3, 0, -1, 1)),
    "single expert": (1, (0, 0, 50, 0)),
    "all experts": (4, (0, 0, 0, 0)),
}


SPECS = {
    "router.weight": P(None, None),
    **dict.fromkeys(("gate_proj.weight", "up_proj.weight"), P("expert", "fsdp", "tensor")),
    "down_proj.weight": P("expert", "tensor", "fsdp"),
    **dict.fromkeys(("gate_proj.lora_a", "up_proj.lora_a", "down_proj.lora_b"), P("expert", None, None)),
    **dict.fromkeys(("gate_proj.lora_b", "up_proj.lora_b"), P("expert", None, "tensor")),
    "down_proj.lora_a": P("expert", "tensor", None),
}
SCALE = 1.5
"""Of the adapters, where there are any."""


def layer(A: int, weights: dict[str, jax.Array]) -> moe.MoE:
    ffn = config.MoeFfn(name="moe", ffn_dim=F, num_experts=E, experts_per_token=A)
    attention = config.GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=8)
    model = config.Model(family="mixtral", vocab_size=8, model_dim=D, num_layers=1, attention=attention, ffn=ffn)
    made = moe.MoE(nnx.Rngs(0), model, config.Compute(), ffn)
    for path, w in weights.items():
        module, name = path.split(".")
        setattr(getattr(made, module), name, nnx.Param(w))
    for linear in (made.gate_proj, made.up_proj, made.down_proj):
        linear.lora_scale = SCALE
    return made


def operands(routing: str) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Weights, x, segment ids, and what the result is multiplied with in the loss."""
    rng = np.random.default_rng(0)
    _, bias = ROUTING[routing]
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    names = {"router.weight": (D, E), "gate_proj.weight": (E, D, F), "up_proj.weight": (E, D, F), "down_proj.weight": (E, F, D)}
    weights = {name: normal(*shape) / shape[-2] ** 0.5 for name, shape in names.items()}
    x = normal(B, T, D)
    x[..., 0] = 1  # so that the first row of the router is a bias
    weights["router.weight"][0] = bias
    segments = np.ones((B, T), np.int32)
    segments[:, T - 2 :] = 2
    segments[2, 4:] = segments[5] = 0
    return weights, x, segments, normal(B, T, D)


def losses(y: Any, balance: Any, z: Any, d: Any) -> Any:
    return jnp.sum(y * d) + 0.7 * balance + 0.3 * z


@cache
def compiled(A: int, mesh: Mesh) -> Any:
    @jax.jit
    def run(weights: Any, x: jax.Array, segments: jax.Array, d: jax.Array) -> Any:
        def loss(weights: Any, x: jax.Array) -> Any:
            y, stats = layer(A, weights)(x, segments)
            return losses(y, stats.load_balance_loss, stats.router_z_loss, d), (y, stats)

        (_, (y, stats)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(weights, x)
        return y, stats, grads

    return run


def place(mesh: Mesh, weights: Any, x: Any, segments: Any, d: Any) -> Any:
    put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))  # noqa: E731
    weights = {path: put(w, *SPECS[path]) for path, w in weights.items()}
    return weights, put(x, BATCH, "context", None), put(segments, BATCH, "context"), put(d, BATCH, "context", None)


def found(A: int, mesh: Mesh, *arrays: Any) -> tuple[Any, router.RouterStats, Any]:
    with jax.set_mesh(mesh):
        return jax.device_get(compiled(A, mesh)(*place(mesh, *arrays)))


def plain(weights: Any, x: Any, segments: Any, A: int) -> tuple[Any, router.RouterStats]:
    """Softmax over all experts, the chosen renormalised; then each expert on every token."""
    valid = (segments != 0)[..., None]
    logits = x @ weights["router.weight"]
    probs = jax.nn.softmax(logits)
    chosen = probs >= jnp.sort(probs)[..., E - A, None]
    share = jnp.where(chosen & valid, probs, 0) / jnp.sum(jnp.where(chosen, probs, 0), axis=-1, keepdims=True)
    y = 0
    for e in range(E):
        gate, up, down = (weights[f"{name}_proj.weight"][e] for name in ("gate", "up", "down"))
        y += share[..., e, None] * ((jax.nn.silu(x @ gate) * (x @ up)) @ down)
    mean = lambda a: jnp.sum(jnp.where(valid, a, 0), axis=(0, 1)) / jnp.sum(valid)  # noqa: E731
    load = mean(chosen / A)
    z = mean(jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True) ** 2)[0]
    entropy = mean(-jnp.sum(probs * jnp.log(probs), axis=-1, keepdims=True))[0]
    counts = jnp.sum(chosen & valid, axis=(0, 1))
    balance = E * jnp.sum(jax.lax.stop_gradient(load) * mean(probs))
    return y, router.RouterStats(counts, balance, z, entropy, jnp.zeros((), int), mean(probs))


@partial(jax.jit, static_argnums=0)
def exact(A: int, weights: Any, x: Any, segments: Any, d: Any) -> Any:
    def loss(weights: Any, x: Any) -> Any:
        y, stats = plain(weights, x, segments, A)
        return losses(y, stats.load_balance_loss, stats.router_z_loss, d), (y, stats)

    (_, (y, stats)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(weights, x)
    return y, stats, grads


@cache
def expected(routing: str) -> tuple[Any, router.RouterStats, Any]:
    weights, x, segments, d = operands(routing)
    with jax.enable_x64(True):
        return jax.device_get(exact(ROUTING[routing][0], *jax.tree.map(np.float64, (weights, x)), segments, np.float64(d)))


@pytest.mark.parametrize(
    ("routing", "mesh"),
    [(r, m) for m in MESHES for r in ROUTING if r != {"one device": "single expert", "fsdp, expert, tensor": "all experts"}[m]],
)
def test_equals_the_loop_over_experts(routing: str, mesh: str) -> None:
    y, stats, (dweights, dx) = found(ROUTING[routing][0], MESHES[mesh], *operands(routing))
    wanted_y, wanted_stats, (wanted_dweights, wanted_dx) = expected(routing)
    scale = {name: np.max(np.abs(b)) for name, b in wanted_dweights.items()}
    assert np.max(np.abs(y - wanted_y)) <= 1e-5 * np.max(np.abs(wanted_y))
    assert np.max(np.abs(dx - wanted_dx)) <= 1e-5 * np.max(np.abs(wanted_dx))
    for name, b in wanted_dweights.items():
        assert np.max(np.abs(dweights[name] - b)) <= 1e-5 * scale[name], name
    assert stats.expert_ids is None  # nobody asked for them
    for name in stats._fields[:-1]:
        np.testing.assert_allclose(getattr(stats, name), getattr(wanted_stats, name), rtol=1e-5, err_msg=name)
    if min(ROUTING[routing][1]) == -50:  # nobody's expert gets no gradient at all
        assert not dweights["gate_proj.weight"][1 if routing == "an empty expert" else 0].any()


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_padding_is_neither_routed_nor_counted(mesh: Mesh) -> None:
    weights, x, segments, d = operands("random")
    before_y, before_stats, (before_dweights, before_dx) = found(2, mesh, weights, x, segments, d)
    pad = segments == 0
    other = np.where(pad[..., None], 7 * np.roll(x, 1, axis=-1) - 2, x)
    y, stats, (dweights, dx) = found(2, mesh, weights, other, segments, d)
    assert pad.any() and not y[pad].any() and not dx[pad].any()
    jax.tree.map(np.testing.assert_array_equal, (y, stats, dweights, dx), (before_y, before_stats, before_dweights, before_dx))
    assert stats.dropped == 0


def test_nothing_but_padding_counts_nothing() -> None:
    weights, x, segments, d = operands("random")
    y, stats, (dweights, dx) = found(2, ONE, weights, x, np.zeros_like(segments), d)
    for a in jax.tree.leaves((y, stats, dweights, dx)):
        assert not np.asarray(a).any()


@pytest.mark.parametrize("fault", ["an id that no expert has", "a token that is taken for padding"])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_assignments_that_vanish_are_counted(mesh: Mesh, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = moe.run_experts

    def wrong(x: Any, routing: Any, *rest: Any) -> Any:
        first = jnp.arange(T) == 0
        ids = routing.expert_ids_BTA
        if fault == "an id that no expert has":
            routing = routing._replace(expert_ids_BTA=ids.at[:, :, 0].set(jnp.where(first, E, ids[:, :, 0])))
        else:
            routing = routing._replace(valid_BT=routing.valid_BT & ~first)
        return right(x, routing, *rest)

    monkeypatch.setattr(moe, "run_experts", wrong)
    weights, x, segments, d = operands("random")
    with jax.set_mesh(mesh):
        placed = place(mesh, weights, x, segments, d)
        _, stats = jax.jit(lambda weights, x, segments, d: layer(2, weights)(x, segments))(*placed)
    valid = np.sum(segments[:, 0] != 0)
    assert stats.dropped == (valid if fault == "an id that no expert has" else 2 * valid)


@jax.jit
def stats_of(logits: jax.Array, ids: jax.Array, valid: jax.Array) -> router.RouterStats:
    return router.router_stats(logits, logits, ids, valid, jnp.sum(valid) * ids.shape[-1])


def test_balanced_and_undecided_router() -> None:
    tokens = np.arange(B * T).reshape(B, T)
    ids = np.stack([tokens % E, (tokens + 1) % E], axis=-1)
    with jax.set_mesh(ONE):
        stats = stats_of(jnp.zeros((B, T, E)), jnp.asarray(ids), jnp.ones((B, T), bool))
    np.testing.assert_allclose(stats.load_E, np.full(E, 1 / E))
    assert stats.load_balance_loss == pytest.approx(1, rel=1e-5)
    assert stats.entropy == pytest.approx(math.log(E), rel=1e-5)
    assert stats.router_z_loss == pytest.approx(math.log(E) ** 2, rel=1e-5)


def test_collapsed_router() -> None:
    """All tokens to one expert: the balance loss is E, the entropy 0."""
    logits = jnp.zeros((B, T, E)).at[..., 2].set(200.0)
    with jax.set_mesh(ONE):
        stats = stats_of(logits, jnp.full((B, T, 1), 2), jnp.ones((B, T), bool))
    np.testing.assert_allclose(stats.load_E, [0, 0, 1, 0])
    assert stats.load_balance_loss == pytest.approx(E, rel=1e-5)
    assert stats.entropy == pytest.approx(0, abs=1e-6)
    assert stats.router_z_loss == pytest.approx(200.0**2)


def test_bfloat16_activations_are_routed_in_float32() -> None:
    """Logits of bfloat16 activations keep the digits that a bfloat16 product would lose."""
    rng = np.random.default_rng(1)
    x, w = jnp.asarray(rng.normal(size=(B, T, D)), jnp.bfloat16), rng.normal(size=(D, E)).astype(np.float32)
    with jax.set_mesh(ONE):
        layer_router = router.Router(nnx.Rngs(0), D, E, 1.0, jnp.dtype("float32"))
        layer_router.weight = nnx.Param(jnp.asarray(w))
        logits = layer_router(x)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, np.asarray(x, np.float64) @ w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_adapters_equal_merged_weights(mesh: Mesh) -> None:
    """Result and gradients; the adapters' are those of the merged weight W + scale * A B, through A and B."""
    J = 3
    weights, *rest = operands("random")
    rng, merged, both = np.random.default_rng(1), dict(weights), dict(weights)
    linears = ("gate_proj", "up_proj", "down_proj")
    for name in linears:
        _, ins, outs = weights[f"{name}.weight"].shape
        a, b = (rng.normal(0, 0.3, shape).astype(np.float32) for shape in ((E, ins, J), (E, J, outs)))
        both |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
        merged[f"{name}.weight"] = weights[f"{name}.weight"] + SCALE * a @ b
    wanted_y, wanted_stats, (wanted, wanted_dx) = found(2, mesh, merged, *rest)
    for name in linears:
        a, b, dw = both[f"{name}.lora_a"], both[f"{name}.lora_b"], wanted[f"{name}.weight"]
        wanted |= {f"{name}.lora_a": SCALE * dw @ b.swapaxes(1, 2), f"{name}.lora_b": SCALE * a.swapaxes(1, 2) @ dw}

    y, stats, (grads, dx) = found(2, mesh, both, *rest)
    np.testing.assert_array_equal(stats.load_E, wanted_stats.load_E)
    pairs = {"y": (y, wanted_y), "x": (dx, wanted_dx)} | {path: (grads[path], wanted[path]) for path in both}
    for what, (a, b) in pairs.items():
        assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(b)), what
