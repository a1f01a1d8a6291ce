"""The mesh: five axes that always exist, an axis for the rest, errors with numbers, and batches laid out on it."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.machine.mesh import AXES, BATCH, axis_size, check_rows, make_mesh, platform, put_batch


def test_all_axes_exist_and_one_takes_the_rest():
    mesh = make_mesh(config.Mesh(fsdp=-1, tensor=2))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}
    assert all(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types)
    with jax.set_mesh(mesh):
        assert [axis_size(axis) for axis in AXES] == [1, 4, 1, 1, 2]
        assert platform() == "cpu"


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"fsdp": 3}, r"mesh \(fsdp 3\) needs 3 devices, but 8 are available; set one axis to -1"),
        ({}, r"mesh \(one device\) needs 1 devices, but 8 are available"),
        ({"fsdp": 3, "expert": -1}, "mesh axes of 3 devices do not divide the 8 available devices"),
        ({"data": 4, "tensor": 4}, r"mesh \(data 4 x tensor 4\) needs 16 devices, but 8"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused_with_the_numbers(sizes, said):
    with pytest.raises(ValueError, match=said):
        make_mesh(config.Mesh(**sizes))


def test_rows_of_a_batch_lie_on_the_batch_axes_in_order():
    mesh = make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    tokens = np.arange(8 * 3).reshape(8, 3)
    whole, part = put_batch((tokens, tokens[:4]), mesh)
    assert whole.sharding.spec == P(BATCH, "context") and np.array_equal(whole, tokens) and np.array_equal(part, tokens[:4])
    for shard in whole.addressable_shards:  # two rows a device, the same on both of `tensor`
        (row,), (_, data, fsdp, *_) = (shard.index[0].start // 2,), (0, *np.argwhere(mesh.devices == shard.device)[0])
        assert row == 2 * data + fsdp and np.array_equal(shard.data, tokens[2 * row : 2 * row + 2])


def test_a_sequence_over_several_processes_is_refused():
    devices = np.array([SimpleNamespace(process_index=i // 4) for i in range(8)])
    check_rows(devices.reshape(1, 2, 1, 2, 2))
    said = "mesh.context 8 x mesh.tensor 1 devices share a sequence, .* of 4 devices, .*; let context x tensor divide 4"
    with pytest.raises(ValueError, match=said):
        check_rows(devices.reshape(1, 1, 1, 8, 1))
