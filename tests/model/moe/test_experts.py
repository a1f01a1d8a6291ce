"""Tokens to experts and back, on one device and over the mesh, against a loop over experts in float64."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.machine.mesh import BATCH, make_mesh
from moe_train.model.moe.expert_weights import ExpertMatrix, ExpertWeights
from moe_train.model.moe.experts import ExpertSettings, Routing, run_experts
from moe_train.model.moe.transport import choose as transport
from tests.compiled_programs import ragged_all_to_all

B, T, D, F, J, E, A = 8, 6, 8, 16, 3, 8, 2
SHUFFLED = [3, 6, 0, 5, 7, 1, 4, 2]
SIZES = [  # every way to lay 8 devices out along four axes
    (data, fsdp, expert, 8 // (data * fsdp * expert))
    for data, fsdp, expert in itertools.product((1, 2, 4, 8), repeat=3)
    if 8 % (data * fsdp * expert) == 0
]


def mesh_of(data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1, context: int = 1, shuffled: bool = False) -> Mesh:
    devices = [jax.devices()[i] for i in SHUFFLED] if shuffled else jax.devices()
    sizes = config.Mesh(data=data, fsdp=fsdp, expert=expert, tensor=tensor, context=context)
    return make_mesh(sizes, devices[: math.prod(sizes.model_dump().values())])


ONE, MIXED = mesh_of(), mesh_of(fsdp=2, expert=2, tensor=2)
CASES = {  # the experts that assignments may go to, and how likely
    "random": {e: 1 for e in range(E)},
    "empty experts": {1: 1, 2: 1, 7: 1},
    "single expert": {5: 1},
    "skewed": {0: 1000, 3: 10, 4: 1},
    "balanced": {},
}


def loop(x: Any, weights: Any, experts: ExpertWeights, ids: Any, valid: Any) -> jax.Array:
    """Each expert, its adapters merged, on every token; then the sum over those that the token chose."""
    y = jnp.zeros_like(x)
    for e in range(E):
        gate, up, down = (m.weight[e] + (0 if m.lora_a is None else m.lora_a[e] @ m.lora_b[e]) for m in experts)
        share = jnp.sum(jnp.where(ids == e, weights, 0), axis=-1, keepdims=True)
        y += share * ((jax.nn.silu(x @ gate) * (x @ up)) @ down)
    return jnp.where(valid[..., None], y, 0)


def operands(case: str, adapted: bool = True) -> tuple[Any, tuple[Any, ...], Any]:
    """(x, weights, experts), (expert ids, valid), dy."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731

    def matrix(ins: int, outs: int) -> ExpertMatrix:
        w, a, b = normal(E, ins, outs) / ins**0.5, normal(E, ins, J) / ins**0.5, normal(E, J, outs) / J**0.5
        return ExpertMatrix(w, a, b) if adapted else ExpertMatrix(w, None, None)

    ids = np.arange(B * T * A, dtype=np.int32).reshape(B, T, A) % E
    if likely := CASES[case]:
        p = np.array([likely.get(e, 0) for e in range(E)], float)
        ids = rng.choice(E, p=p / p.sum(), size=(B, T, A)).astype(np.int32)
    valid = rng.random((B, T)) < 0.8
    valid[0] = False
    experts = ExpertWeights(matrix(D, F), matrix(D, F), matrix(F, D))
    return (normal(B, T, D), rng.random((B, T, A)).astype(np.float32), experts), (ids, valid), normal(B, T, D)


def with_room(ids: np.ndarray, valid: np.ndarray, capacity_factor: float) -> np.ndarray:
    """Each row's assignments in their order; those that find their expert full go to E, which is nobody."""
    room, ids = math.ceil(capacity_factor * T * A / E), ids.copy()
    for b in range(B):
        taken: Counter[int] = Counter()
        for t, a in itertools.product(range(T), range(A)):
            if valid[b, t]:
                taken[ids[b, t, a]] += 1
                if taken[ids[b, t, a]] > room:
                    ids[b, t, a] = E
    return ids


@cache
def expected(case: str, adapted: bool, capacity_factor: float | None) -> tuple[Any, Any, int]:
    """Result, gradients, and how many assignments have an expert."""
    primals, (ids, valid), dy = operands(case, adapted)
    if capacity_factor is not None:
        ids = with_room(ids, valid, capacity_factor)
    with jax.enable_x64(True):
        primals, dy = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (primals, dy))
        return *jax.device_get(exact(primals, (ids, valid), dy)), int(np.sum((ids < E) & valid[..., None]))


@jax.jit
def exact(primals: Any, fixed: Any, dy: Any) -> Any:
    y, vjp = jax.vjp(lambda *p: loop(*p, *fixed), *primals)
    return y, vjp(dy)


def specs(adapted: bool) -> tuple[Any, ...]:
    tokens, into = P(BATCH, "context", None), ("expert", "fsdp", "tensor")
    up = ExpertMatrix(P(*into), P("expert", None, None), P("expert", None, "tensor"))
    down = ExpertMatrix(P("expert", "tensor", "fsdp"), P("expert", "tensor", None), P("expert", None, None))
    if not adapted:
        up, down = (m._replace(lora_a=None, lora_b=None) for m in (up, down))
    return (tokens, tokens, ExpertWeights(up, up, down)), (tokens, P(BATCH, "context")), tokens


@cache
def compiled(kernel: str, mesh: Mesh, transport: str, capacity_factor: float | None) -> Any:
    @jax.jit
    def run(primals: Any, fixed: Any, dy: Any) -> Any:
        ids, valid = fixed

        def f(x: jax.Array, weights: jax.Array, experts: ExpertWeights) -> tuple[jax.Array, jax.Array]:
            settings = ExpertSettings(kernel, transport, capacity_factor)
            return run_experts(x, Routing(ids, weights, valid), experts, settings)

        y, vjp, computed = jax.vjp(f, *primals, has_aux=True)
        return y, vjp(dy), computed

    return run


def check(
    case: str,
    mesh: Mesh,
    kernel: str = "blocked",
    transport: str = "all_gather",
    adapted: bool = True,
    capacity_factor: float | None = None,
) -> None:
    with jax.set_mesh(mesh):
        put = lambda spec, x: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
        placed = jax.tree.map(put, specs(adapted), operands(case, adapted))
        y, (dx, dweights, dexperts), computed = jax.device_get(compiled(kernel, mesh, transport, capacity_factor)(*placed))
    _, (_, valid), _ = operands(case)
    wanted_y, (wanted_x, wanted_weights, wanted_experts), wanted_computed = expected(case, adapted, capacity_factor)
    assert computed == wanted_computed
    assert not y[~valid].any() and not dx[~valid].any() and not dweights[~valid].any()
    assert not dweights[wanted_weights == 0].any()  # of what is dropped
    for what, a, b in (("y", y, wanted_y), ("x", dx, wanted_x), ("weights", dweights, wanted_weights)):
        assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(b)), what
    for name in ExpertWeights._fields:
        for field, wanted in getattr(wanted_experts, name)._asdict().items():
            if wanted is not None:
                a, b = (x.reshape(E, -1) for x in (getattr(getattr(dexperts, name), field), wanted))
                assert (np.max(np.abs(a - b), axis=1) <= 1e-5 * np.max(np.abs(b), axis=1)).all(), f"{name}.{field}"


@pytest.fixture
def ragged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    monkeypatch.setattr(transport, "platform", lambda: "a platform that has it")


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "data {} fsdp {} expert {} tensor {}".format(*sizes))
def test_equals_the_loop_over_experts_on_every_mesh(sizes: tuple[int, ...], ragged: None) -> None:
    data, _, expert, _ = sizes
    ragged_too = ("ragged_all_to_all",) if data == 1 else ()  # replicas have it in the test below
    for name in ("all_gather",) if expert == 1 else ("all_gather", "all_to_all", *ragged_too):
        for case in CASES:
            check(case, mesh_of(*sizes), transport=name, adapted=False)


@pytest.mark.parametrize("transport", ["all_gather", "all_to_all", "ragged_all_to_all"])
def test_the_order_of_the_devices_does_not_matter(transport: str, ragged: None) -> None:
    for case in CASES:
        check(case, mesh_of(2, 1, 4, shuffled=True), transport=transport, adapted=False)


@pytest.mark.parametrize("transport", ["all_gather", "all_to_all", "ragged_all_to_all"])
def test_adapters_go_with_their_experts(transport: str, ragged: None) -> None:
    for case in CASES:
        check(case, MIXED, transport=transport)


CAPACITY = {
    "one device": (ONE, "all_gather"),
    "expert": (mesh_of(expert=8), "all_to_all"),
    "data, fsdp, expert": (mesh_of(2, 2, 2, shuffled=True), "all_gather"),
    "expert, context": (mesh_of(expert=4, context=2), "ragged_all_to_all"),
    "fsdp, context, tensor": (mesh_of(fsdp=2, context=2, tensor=2), "all_gather"),
}


@pytest.mark.parametrize("mesh", CAPACITY)
@pytest.mark.parametrize("capacity_factor", [0.6, 1.0])
def test_what_is_beyond_the_capacity_is_dropped_alike_on_every_mesh(mesh: str, capacity_factor: float, ragged: None) -> None:
    for case in CASES:
        kept = expected(case, False, capacity_factor)[2]
        assert kept < expected(case, False, None)[2] or case == "balanced"
        check(case, *CAPACITY[mesh][:1], transport=CAPACITY[mesh][1], adapted=False, capacity_factor=capacity_factor)


def test_a_platform_without_the_collective_says_so() -> None:
    with pytest.raises(ValueError, match=r"ragged_all_to_all: CPUs have no such collective; use all_to_all"):
        check("random", mesh_of(expert=2), transport="ragged_all_to_all")


@pytest.mark.parametrize("kernel", ["reference", "ragged_dot", "megablox"])
@pytest.mark.parametrize("case", ["random", "single expert"])
def test_every_kernel_is_right_on_a_mesh(kernel: str, case: str) -> None:
    check(case, MIXED, kernel)
