"""Functions of each device's parts, on eight devices and on one, where no mesh axis is named and nothing is summed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train.model.sharding.local_view import in_local_view, index_along, sum_along, vary
from moe_train.model.sharding.specs import spec_of
from tests.tiny import EIGHT, ONE

B, D = 8, 6


def weighted_sums(x_BD: jax.Array, w_D: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum of all rows times w, and 1 plus each device's index along fsdp, times x."""

    def local(x_bD: jax.Array, w_D: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = jnp.sum(x_bD * vary(w_D, ("fsdp", "expert")))
        return sum_along(y, ("fsdp", "expert")), x_bD * (1 + index_along("fsdp"))

    rows = P(("fsdp", "expert"), None)
    return in_local_view(local, in_specs=(rows, P(None)), out_specs=(P(), rows))(x_BD, w_D)


@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["one device", "eight devices"])
def test_sums_and_gradients_are_those_of_the_whole_array(mesh: Mesh) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(B, D)).astype(np.float32), rng.normal(size=D).astype(np.float32)
    with jax.set_mesh(mesh):
        rows = P(("fsdp", "expert"), None)
        x_BD = jax.device_put(x, NamedSharding(mesh, rows))
        total, indexed = jax.jit(weighted_sums)(x_BD, w)
        gradient = jax.jit(jax.grad(lambda w: weighted_sums(x_BD, w)[0]))(w)
        assert spec_of(indexed) == rows
    np.testing.assert_allclose(total, np.sum(x * w), rtol=1e-5)
    np.testing.assert_allclose(gradient, x.sum(axis=0), rtol=1e-5)
    along_fsdp = np.repeat(np.arange(mesh.shape["fsdp"]), B // mesh.shape["fsdp"])
    np.testing.assert_allclose(indexed, x * (1 + along_fsdp[:, None]), rtol=1e-6)


@pytest.mark.parametrize(("mesh", "sums"), [(ONE, False), (EIGHT, True)], ids=["one device", "eight devices"])
def test_only_several_devices_sum(mesh: Mesh, sums: bool) -> None:
    with jax.set_mesh(mesh):
        x_BD = jax.device_put(jnp.ones((B, D)), NamedSharding(mesh, P(("fsdp", "expert"), None)))
        gradient = jax.grad(lambda w, x: weighted_sums(x, w)[0])
        program = jax.jit(gradient).lower(jnp.ones(D), x_BD).compile().as_text()
    assert ("all-reduce" in program) == sums
