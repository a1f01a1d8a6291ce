"""Softmax and sigmoid routers with a bias, and shared experts, against the formulas of the papers in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.machine.mesh import BATCH
from moe_train.model.moe import layer, router
from tests.tiny import EIGHT, ONE

B, T, D, F, E, A = 8, 4, 16, 12, 8, 2
ROUTERS: dict[str, config.Router] = {
    "softmax": config.SoftmaxRouter(name="softmax", bias=True),
    "sigmoid": config.SigmoidRouter(name="sigmoid", bias=False, scale=2.5),
    "sigmoid with a bias": config.SigmoidRouter(name="sigmoid", bias=True),
    "sigmoid in groups": config.SigmoidRouter(name="sigmoid", bias=True, num_groups=4, groups_per_token=2),
}
SHARED = {"softmax": 1, "sigmoid": 2, "sigmoid with a bias": 0, "sigmoid in groups": 0}


def made(name: str) -> layer.MoE:
    ffn = config.MoeFfn(
        name="moe", ffn_dim=F, num_experts=E, experts_per_token=A, router=ROUTERS[name], num_shared_experts=SHARED[name]
    )
    attention = config.GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=8)
    model = config.Model(family="mixtral", vocab_size=8, model_dim=D, num_layers=1, attention=attention, ffn=ffn)
    return layer.MoE(nnx.Rngs(0), model, config.Compute(), ffn)


def flat(name: str) -> tuple[Any, dict[str, Any]]:
    """(structure, {path: shape}) of the layer."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(jax.eval_shape(lambda: made(name)))
    return structure, {".".join(str(getattr(k, "name", getattr(k, "key", k))) for k in keys[:-1]): leaf for keys, leaf in leaves}


def plain(weights: Any, x: Any, valid: Any, router: config.Router) -> Any:
    """(sum of each token's experts, assignments of each expert, balance loss)."""
    bias = weights.get("router.bias", np.zeros(E))
    logits = x @ weights["router.weight"]
    sigmoid = isinstance(router, config.SigmoidRouter)
    scores = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits)
    by = scores + bias
    if sigmoid and router.num_groups > 1:
        pairs = by.reshape(B, T, router.num_groups, -1)
        best = jnp.sort(pairs, axis=-1)[..., -2:].sum(-1, keepdims=True)
        by = jnp.where(best >= jnp.sort(best, axis=2)[:, :, -router.groups_per_token, None], pairs, -9).reshape(B, T, E)
    chosen = jnp.any(jax.lax.top_k(by, A)[1][..., None] == jnp.arange(E), axis=-2)
    share = jnp.where(chosen, scores, 0)
    share = (router.scale if sigmoid else 1) * share / share.sum(-1, keepdims=True)
    swiglu = lambda x, gate, up, down: (jax.nn.silu(x @ gate) * (x @ up)) @ down  # noqa: E731
    of = lambda name, *at: [weights[f"{name}{m}_proj.weight"][at] for m in ("gate", "up", "down")]  # noqa: E731
    y = sum(share[..., e, None] * swiglu(x, *of("", e)) for e in range(E)) * valid[..., None]
    if "shared.gate_proj.weight" in weights:
        y += swiglu(x, *of("shared.", ...))
    counts = jnp.sum(chosen & valid[..., None], axis=(0, 1))
    mean = jnp.sum(scores / scores.sum(-1, keepdims=True) * valid[..., None], axis=(0, 1)) / valid.sum()
    return y, counts, E * jnp.sum(jax.lax.stop_gradient(counts / counts.sum()) * mean)


@cache
def operands(name: str) -> tuple[dict[str, Any], Any, Any, Any]:
    """Weights, x, segment ids, and what the result is multiplied with in the loss."""
    rng = np.random.default_rng(0)
    with jax.set_mesh(EIGHT):
        shapes = flat(name)[1]
    weights = {path: (rng.normal(size=s.shape) / s.shape[-2:][0] ** 0.5).astype(np.float32) for path, s in shapes.items()}
    segments = np.ones((B, T), np.int32)
    segments[1], segments[4, 2:] = 0, 0
    x, d = (rng.normal(size=(B, T, D)).astype(np.float32) for _ in range(2))
    return weights, x, segments, d


@pytest.mark.parametrize("name", ROUTERS)
def test_equals_the_formulas(name: str) -> None:
    weights, x, segments, d = operands(name)

    def loss(run: Any, weights: Any, x: Any, d: Any) -> Any:
        y, counts, balance = run(weights, x)
        return jnp.sum(y * d) + 3.0 * balance, (y, counts)

    with jax.enable_x64(True):
        exact = lambda w, x: plain(w, x, segments != 0, ROUTERS[name])  # noqa: E731
        doubles = jax.tree.map(np.float64, (weights, x, d))
        wanted = jax.jit(jax.grad(lambda *args: loss(exact, *args), (0, 1), has_aux=True))(*doubles)
    (wanted_weights, wanted_x), (wanted_y, wanted_counts) = jax.device_get(wanted)

    with jax.set_mesh(EIGHT):
        structure, like = flat(name)
        placed = {path: jax.device_put(w, NamedSharding(EIGHT, like[path].sharding.spec)) for path, w in weights.items()}
        tokens = NamedSharding(EIGHT, P(BATCH, "context"))

        def ours(weights: Any, x: Any, segments: Any, d: Any) -> Any:
            def run(weights: Any, x: Any) -> Any:
                y, stats = structure.unflatten([weights[path] for path in like])(x, segments)
                return y, (stats.chosen_E, stats.dropped), stats.load_balance_loss

            return jax.grad(lambda *args: loss(run, *args), (0, 1), has_aux=True)(weights, x, d)

        args = (jax.device_put(a, tokens) for a in (x, segments, d))
        (dweights, dx), (y, (counts, dropped)) = jax.device_get(jax.jit(ours)(placed, *args))

    assert dropped == 0
    np.testing.assert_array_equal(counts, wanted_counts)
    for path, a, b in [("y", y, wanted_y), ("x", dx, wanted_x), *((p, dweights[p], b) for p, b in wanted_weights.items())]:
        if path == "router.bias":
            assert not a.any() and not b.any()
        else:
            assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(b)), path


def test_a_bias_chooses_and_does_not_weigh() -> None:
    """The weights of a token whose experts stay the same do not change with the bias; a large bias takes every token."""
    name = "sigmoid with a bias"
    weights, x, segments, _ = operands(name)
    with jax.set_mesh(ONE):
        structure, like = flat(name)
        run = jax.jit(lambda w, x, segments: structure.unflatten([w[path] for path in like])(x, segments))
        x, segments = (jax.device_put(a, P(BATCH, "context")) for a in (x, segments))
        none, even, drawn = (
            run({**weights, "router.bias": bias}, x, segments)
            for bias in (np.zeros(E, np.float32), np.full(E, 0.3, np.float32), np.eye(E, dtype=np.float32)[3] * 9)
        )
    np.testing.assert_array_equal(none[0], even[0])
    assert drawn[1].chosen_E[3] == np.sum(segments != 0) > none[1].chosen_E[3]


def test_the_next_bias_follows_the_load() -> None:
    chosen = np.array([[4, 4, 4, 4], [0, 2, 6, 8]], np.int32)
    moved = router.next_bias(jnp.zeros((2, 4)), jnp.asarray(chosen), 0.5)
    np.testing.assert_array_equal(moved, [[0, 0, 0, 0], [0.5, 0.5, -0.5, -0.5]])


@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["one device", "eight"])
def test_the_balance_loss_of_rows_is_the_mean_over_their_tokens(mesh: jax.sharding.Mesh) -> None:
    """Each row by itself in float64 (DeepSeek-V3, eq. 17 to 19); a row of padding has no weight."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(B, T, E)).astype(np.float32)
    ids = np.argsort(-logits, axis=-1)[..., :A].astype(np.int32)
    valid = np.arange(T) < rng.integers(1, T + 1, B)[:, None]
    valid[0] = False
    with jax.set_mesh(mesh):
        place = lambda x: jax.device_put(x, NamedSharding(mesh, P(BATCH, "context")))  # noqa: E731
        computed = jnp.int32(0)
        run = jax.jit(lambda x, chosen, ok: router.router_stats(x, x, chosen, ok, computed, balances_rows=True))
        stats = run(place(logits), place(ids), place(valid))
    probs = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(-1, keepdims=True)
    total = 0.0
    for row in range(1, B):
        tokens = valid[row].sum()
        load = np.bincount(ids[row][valid[row]].ravel(), minlength=E) / (tokens * A)
        total += tokens * E * (load * probs[row][valid[row]].mean(0)).sum()
    assert float(stats.load_balance_loss) == pytest.approx(total / valid.sum(), rel=1e-5)
