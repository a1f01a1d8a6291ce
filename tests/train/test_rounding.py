"""Updates of bfloat16 weights: against float32, on meshes, and at random against the definition."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.train.optimizer import make_optimizer
from moe_train.train.rounding import apply_updates, round_stochastically
from tests.meshes import mesh_of
from tests.train.optimizer_reference import gradients, random_parameters, shapes_of

KINDS = ("embed.weight", "q_proj.weight", "down_proj.weight", "router.weight", "final_norm.scale")
PARAMETERS = {path: x for path, x in random_parameters().items() if path.endswith(KINDS)}
ONE = mesh_of(config.Mesh())
EIGHT = mesh_of(config.Mesh(fsdp=2, expert=2, tensor=2))


def run(rounding: config.Rounding, mesh: jax.sharding.Mesh = ONE, dtype: str = "bfloat16", steps: int = 39) -> dict:
    """{"weights", "masters", "vanished"} after some steps at a learning rate of 1e-5, on the host."""
    section = config.AdamW(name="adamw", learning_rate=1e-5, weight_decay=0.1, rounding=rounding)
    optimizer = make_optimizer(section, steps)

    @jax.jit
    def step(weights, state, grads, key):
        updates, state = optimizer.update(grads, state, weights)
        weights, vanished = apply_updates(rounding, weights, updates, state, key)
        return weights, state, vanished

    with jax.set_mesh(mesh):
        specs = {path: shapes_of(None)[path].sharding.spec if mesh is EIGHT else P() for path in PARAMETERS}
        place = partial(lambda path, x: jax.device_put(jnp.asarray(x, dtype), NamedSharding(mesh, specs[path])))
        weights = {path: place(path, x) for path, x in PARAMETERS.items()}
        state = jax.jit(optimizer.init)(weights)
        for i in range(steps):
            grads = {path: place(path, g) for path, g in gradients(i, PARAMETERS).items()}
            weights, state, vanished = step(weights, state, grads, jax.random.fold_in(jax.random.key(0), i))
        return jax.device_get({"weights": weights, "masters": getattr(state, "masters", {}), "vanished": vanished})


def test_masters_follow_float32_where_nearest_loses_updates() -> None:
    exact = run("nearest", dtype="float32")
    found = run("float32_master")
    lost = run("nearest")
    assert exact["vanished"] is None and found["vanished"] is None
    start = {path: np.asarray(x, jnp.bfloat16).astype(np.float32) for path, x in PARAMETERS.items()}
    moved, lost_moved, total = 0, 0, 0
    for path, first in start.items():
        # The same gradients and moments in float32; they differ by the rounding of the first weights and of the gradients.
        change = exact["weights"][path] - PARAMETERS[path]
        np.testing.assert_allclose(found["masters"][path] - first, change, atol=0.02 * np.abs(change).max())
        np.testing.assert_array_equal(found["weights"][path], found["masters"][path].astype(jnp.bfloat16))
        moved += np.sum(found["masters"][path] != first)
        lost_moved += np.sum(lost["weights"][path].astype(np.float32) != first)
        total += first.size
    # Gradients are random here, so that a few weights come back to where they started.
    assert moved > 0.999 * total and lost_moved < 0.15 * total
    assert lost["vanished"] > 0.9


def test_stochastic_rounding_follows_float32_on_average() -> None:
    exact = run("nearest", dtype="float32")
    found = run("stochastic")
    assert not found["masters"] and found["vanished"] is None
    projection, square = 0.0, 0.0
    for path, x in PARAMETERS.items():
        change = found["weights"][path].astype(np.float32) - np.asarray(x, jnp.bfloat16).astype(np.float32)
        expected = exact["weights"][path] - x
        projection += np.sum(change * expected)
        square += np.sum(expected**2)
    # A single weight moves by whole steps of bfloat16; the projection on the exact change is right on average.
    assert projection / square == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("rounding", ["float32_master", "stochastic"])
def test_every_mesh_rounds_alike(rounding: config.Rounding) -> None:
    """Random bits depend on seed, step and path; with equal gradients only the norm's order of summation differs."""
    one, eight = run(rounding, steps=3), run(rounding, EIGHT, steps=3)
    for path in PARAMETERS:
        differ = np.mean(one["weights"][path] != eight["weights"][path])
        assert differ < 1e-3, path
    for path, master in one["masters"].items():
        np.testing.assert_allclose(master, eight["masters"][path], rtol=1e-6)


def test_rounds_to_a_neighbour_as_often_as_it_is_near() -> None:
    values = np.array([1 + 2**-9, -1 - 3 * 2**-9, 1.0, 0.0, 3e-30, np.inf, -np.inf, np.nan, 3.3895e38], np.float32)
    bits = jnp.arange(2**16, dtype=jnp.uint16)  # every draw once
    rounded = np.asarray(jax.vmap(lambda b: round_stochastically(jnp.asarray(values), jnp.full(len(values), b)))(bits))
    share = (rounded.astype(np.float64) != np.asarray(values, jnp.bfloat16).astype(np.float64)).mean(axis=0)
    # A quarter of the way up; three quarters, of which nearest takes the upper neighbour; exact numbers stay.
    np.testing.assert_allclose(share[:4], [0.25, 0.25, 0, 0], atol=1e-4)
    assert rounded[:, :5].astype(np.float64).mean(axis=0) == pytest.approx(values[:5], rel=1e-4)
    assert (rounded[:, 5] == np.inf).all() and (rounded[:, 6] == -np.inf).all() and np.isnan(rounded[:, 7].astype(float)).all()
