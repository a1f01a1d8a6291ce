"""Gathers and the scatters of their gradients, as every platform has them and in the stages that TPUs are asked for."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.machine.mesh import make_mesh, slices_along
from moe_train.model.sharding import collectives

MESHES = {"all devices": config.Mesh(fsdp=8), "a replica": config.Mesh(data=2, fsdp=4), "some": config.Mesh(fsdp=4, expert=2)}
PLACES = {"cpu": ("cpu", 1), "tpu": ("tpu", 1), "two slices": ("tpu", 2), "a slice each": ("tpu", 4)}


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize(("on", "slices"), PLACES.values(), ids=PLACES)
def test_gather_concatenates_and_its_gradient_is_summed_and_scattered(
    sizes: config.Mesh, on: str, slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "platform", lambda: on)
    monkeypatch.setattr(collectives, "slices_along", lambda axis: slices)
    mesh, rng = make_mesh(sizes), np.random.default_rng(0)
    x, dy = rng.normal(size=(8, 16, 24)).astype(np.float32), rng.normal(size=(sizes.fsdp, 8, 16, 24)).astype(np.float32)

    def run(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        found: list[jax.Array] = []
        for dim in range(3):
            spec = P(*("fsdp" if d == dim else None for d in range(3)))

            def local(x: jax.Array, dy: jax.Array, dim: int = dim) -> tuple[jax.Array, jax.Array]:
                y, vjp = jax.vjp(lambda x: collectives.gather_axis(x, "fsdp", dim), x)
                return y[None], *vjp(dy[0])

            out_specs = (P("fsdp"), spec)
            found += jax.shard_map(local, in_specs=(spec, P("fsdp")), out_specs=out_specs)(jax.reshard(x, spec), dy)
        return tuple(found)

    with jax.set_mesh(mesh):
        found = jax.jit(run)(x, jax.device_put(dy, NamedSharding(mesh, P("fsdp"))))
    for y, dx in zip(found[::2], found[1::2], strict=True):
        np.testing.assert_array_equal(y, jnp.broadcast_to(x, y.shape))
        np.testing.assert_allclose(dx, dy.sum(0), rtol=1e-5, atol=1e-5)


def test_stages_of_an_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    def stages(**sizes: int) -> tuple[list[collectives.AxisGroups] | list[None], collectives.AxisGroups]:
        with jax.set_mesh(make_mesh(config.Mesh(**sizes))):
            return collectives._stages("fsdp")

    assert stages(fsdp=8) == ([None], [])
    monkeypatch.setattr(collectives, "platform", lambda: "tpu")
    assert stages(fsdp=8) == ([[[0, 2, 4, 6], [1, 3, 5, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]]], [])
    assert stages(fsdp=4, data=2) == ([[[0, 2], [1, 3]], [[0, 1], [2, 3]]], [])
    assert stages(fsdp=4, expert=2) == ([None], [])
    monkeypatch.setattr(collectives, "slices_along", lambda axis: 2)
    between = [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert stages(fsdp=8) == ([[[0, 2], [1, 3], [4, 6], [5, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]]], between)
    assert stages(fsdp=4, expert=2) == ([[[0, 1], [2, 3]]], [[0, 2], [1, 3]])
    assert stages(fsdp=2, expert=4) == ([], [[0, 1]])


def test_slices_along_an_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    def slices(order: list[int], **sizes: int) -> int:
        mesh = make_mesh(config.Mesh(**sizes))
        chips = np.array([SimpleNamespace(slice_index=i) for i in order]).reshape(mesh.devices.shape)
        monkeypatch.setattr("moe_train.machine.mesh.get_concrete_mesh", lambda: SimpleNamespace(devices=chips, empty=False))
        with jax.set_mesh(mesh):
            return slices_along("fsdp")

    one_after_the_other = [0, 0, 0, 0, 1, 1, 1, 1]
    assert slices([0] * 8, fsdp=8) == 1
    assert slices(one_after_the_other, fsdp=8) == 2
    assert slices(one_after_the_other, fsdp=2, expert=4) == 2
    assert slices(one_after_the_other, data=2, fsdp=4) == 1
    assert slices([0, 1] * 4, fsdp=8) == 8
    assert slices([0, 0, 0, 1, 1, 1, 2, 2], fsdp=8) == 8
