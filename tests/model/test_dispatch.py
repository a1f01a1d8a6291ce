"""Tokens to experts and back, on one device and over the mesh, against a loop over experts in float64."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.mesh import BATCH, make_mesh
from moe_train.model import dispatch
from moe_train.model.dispatch import ExpertMatrix, ExpertWeights
from tests.model.conftest import quick_jit

B, T, D, F, J, E, A = 8, 5, 8, 12, 3, 8, 2
MESHES = {
    "one device": make_mesh(config.Mesh(), jax.devices()[:1]),
    "expert": make_mesh(config.Mesh(expert=8)),
    "fsdp, expert, tensor": make_mesh(config.Mesh(fsdp=2, expert=2, tensor=2)),
    "data, expert": make_mesh(config.Mesh(data=2, expert=4)),
    "data, fsdp, tensor": make_mesh(config.Mesh(data=2, fsdp=2, tensor=2)),
}
CASES = {  # the experts that assignments may go to, and how likely
    "random": {e: 1 for e in range(E)},
    "empty experts": {1: 1, 2: 1, 7: 1},
    "single expert": {5: 1},
    "skewed": {0: 1000, 3: 10, 4: 1},
}


def loop(x: Any, weights: Any, experts: ExpertWeights, ids: Any, valid: Any) -> jax.Array:
    """Each expert, its adapters merged, on every token; then the sum over those that the token chose."""
    y = jnp.zeros_like(x)
    for e in range(E):
        gate, up, down = (m.weight[e] + m.lora_a[e] @ m.lora_b[e] for m in experts)
        share = jnp.sum(jnp.where(ids == e, weights, 0), axis=-1, keepdims=True)
        y += share * ((jax.nn.silu(x @ gate) * (x @ up)) @ down)
    return jnp.where(valid[..., None], y, 0)


def operands(case: str) -> tuple[Any, tuple[Any, ...], Any]:
    """(x, weights, experts), (expert ids, valid), dy."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731

    def matrix(ins: int, outs: int) -> ExpertMatrix:
        return ExpertMatrix(normal(E, ins, outs) / ins**0.5, normal(E, ins, J) / ins**0.5, normal(E, J, outs) / J**0.5)

    likely = np.array([CASES[case].get(e, 0) for e in range(E)], float)
    ids = rng.choice(E, p=likely / likely.sum(), size=(B, T, A)).astype(np.int32)
    valid = rng.random((B, T)) < 0.8
    valid[0] = False
    experts = ExpertWeights(matrix(D, F), matrix(D, F), matrix(F, D))
    return (normal(B, T, D), rng.random((B, T, A)).astype(np.float32), experts), (ids, valid), normal(B, T, D)


@cache
def expected(case: str) -> tuple[Any, Any]:
    primals, (ids, valid), dy = operands(case)
    with jax.enable_x64(True):
        primals, dy = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (primals, dy))
        return jax.device_get(exact(primals, (ids, valid), dy))


@quick_jit
def exact(primals: Any, fixed: Any, dy: Any) -> Any:
    y, vjp = jax.vjp(lambda *p: loop(*p, *fixed), *primals)
    return y, vjp(dy)


def specs() -> tuple[Any, ...]:
    tokens, into = P(BATCH, "context", None), ("expert", "fsdp", "tensor")
    up = ExpertMatrix(P(*into), P("expert", None, None), P("expert", None, "tensor"))
    down = ExpertMatrix(P("expert", "tensor", "fsdp"), P("expert", "tensor", None), P("expert", None, None))
    return (tokens, tokens, ExpertWeights(up, up, down)), (tokens, P(BATCH, "context")), tokens


@cache
def compiled(kernel: str, mesh: Mesh, transport: str) -> Any:
    @quick_jit
    def run(primals: Any, fixed: Any, dy: Any) -> Any:
        ids, valid = fixed

        def f(x: jax.Array, weights: jax.Array, experts: ExpertWeights) -> tuple[jax.Array, jax.Array]:
            return dispatch.run_experts(x, ids, weights, valid, experts, kernel, transport=transport)

        y, vjp, computed = jax.vjp(f, *primals, has_aux=True)
        return y, vjp(dy), computed

    return run


def found(case: str, mesh: Mesh, kernel: str = "blocked", transport: str = "all_gather") -> Any:
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda spec, x: jax.device_put(x, NamedSharding(mesh, spec)), specs(), operands(case))
        return jax.device_get(compiled(kernel, mesh, transport)(*placed))


def check(case: str, mesh: Mesh, kernel: str = "blocked", transport: str = "all_gather") -> None:
    y, grads, computed = found(case, mesh, kernel, transport)
    _, (_, valid), _ = operands(case)
    assert computed == valid.sum() * A
    wanted_y, (wanted_x, wanted_weights, wanted_experts) = expected(case)
    dx, dweights, dexperts = grads
    assert not y[~valid].any() and not dx[~valid].any() and not dweights[~valid].any()
    for what, a, b in (("y", y, wanted_y), ("x", dx, wanted_x), ("weights", dweights, wanted_weights)):
        assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(b)), what
    for name in ExpertWeights._fields:
        for field in ("weight", "lora_a", "lora_b"):
            a, b = (getattr(getattr(experts, name), field).reshape(E, -1) for experts in (dexperts, wanted_experts))
            assert (np.max(np.abs(a - b), axis=1) <= 1e-5 * np.max(np.abs(b), axis=1)).all(), f"{name}.{field}"


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop_over_experts(mesh: str, case: str) -> None:
    check(case, MESHES[mesh])


@pytest.mark.parametrize("mesh", ["expert", "fsdp, expert, tensor", "data, expert"])
@pytest.mark.parametrize("case", CASES)
def test_all_to_all_equals_the_loop_over_experts(mesh: str, case: str) -> None:
    check(case, MESHES[mesh], transport="all_to_all")


@pytest.mark.parametrize("kernel", ["reference", "ragged_dot", "megablox"])
@pytest.mark.parametrize("case", ["random", "single expert"])
def test_every_kernel_is_right_on_a_mesh(kernel: str, case: str) -> None:
    check(case, MESHES["fsdp, expert, tensor"], kernel)


def test_dispatch_and_combine_differentiate_as_indexing_does() -> None:
    rng = np.random.default_rng(0)
    m, R = 6, 6 * A
    x, y, d, dy = (jnp.asarray(rng.normal(size=(n, D)), jnp.float32) for n in (m, R, m, R))
    weights = jnp.asarray(rng.random((m, A)), jnp.float32)
    order = jnp.asarray(rng.permutation(R))
    inverse = jnp.argsort(order).reshape(m, A)

    @partial(quick_jit, static_argnums=0)
    def pull(f: Any, primals: Any, d: Any) -> Any:
        y, vjp = jax.vjp(f, *primals)
        return y, *vjp(d)

    def close(ours: Any, plain: Any) -> None:
        for a, b in zip(ours, plain, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    ours = pull(lambda x: dispatch.dispatch(x, order, inverse), (x,), dy)
    close(ours, pull(lambda x: jnp.repeat(x, A, axis=0)[order], (x,), dy))
    ours = pull(lambda y, w: dispatch.combine(y, w, order, inverse), (y, weights), d)
    close(ours, pull(lambda y, w: jnp.sum(w[..., None] * y[inverse], axis=1), (y, weights), d))
