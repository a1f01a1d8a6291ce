"""Names of accelerators, and what is said of those that do not exist."""

from __future__ import annotations

import pytest

from moe_train.plan.topology import GPU_DEVICES, parse_topology, slice_shapes


@pytest.mark.parametrize(
    ("name", "canonical", "chips", "devices"),
    [
        ("v5p:4x4x4", "v5p:4x4x4", 64, 64),
        ("v5p:2x2x1", "v5p:2x2x1", 4, 4),
        ("v5e:4x4", "v5e:4x4", 16, 16),
        ("v6e:8x8", "v6e:8x8", 64, 64),
        ("tpu7x:2x2x2", "tpu7x:2x2x2", 8, 16),
        ("v5p-64", "v5p:2x4x4", 32, 32),
        ("v5p-8", "v5p:2x2x1", 4, 4),
        ("V5P-128", "v5p:4x4x4", 64, 64),
        ("tpu7x-16", "tpu7x:2x2x2", 8, 16),
        ("v5litepod-16", "v5e:4x4", 16, 16),
        ("v6e-16", "v6e:4x4", 16, 16),
        ("2xv5p:4x4x4", "2xv5p:4x4x4", 128, 128),
        ("2*v5p-64", "2xv5p:2x4x4", 64, 64),
        ("h100x8", "h100x8", 8, 8),
        ("4*h100x8", "4xh100x8", 32, 32),
        ("l40sx4", "l40sx4", 4, 4),
        ("2xmi300xx8", "2xmi300xx8", 16, 16),
        ("mi300x8", "mi300xx8", 8, 8),
        ("4090x2", "rtx4090x2", 2, 2),
        ("4xrtx4090x8", "4xrtx4090x8", 32, 32),
    ],
)
def test_what_a_name_stands_for(name: str, canonical: str, chips: int, devices: int) -> None:
    topology = parse_topology(name)
    assert (topology.name, topology.num_chips, topology.num_devices) == (canonical, chips, devices)
    assert parse_topology(topology.name) == topology


@pytest.mark.parametrize("device", GPU_DEVICES)
def test_every_gpu_can_be_named(device: str) -> None:
    assert parse_topology(f"{device}x8").device == device


def test_a_slice_of_several() -> None:
    topology = parse_topology("3xtpu7x:2x2x1")
    assert (topology.platform, topology.device, topology.shape, topology.num_slices) == ("tpu", "tpu7x", (2, 2, 1), 3)
    assert (topology.slice_name, topology.chips_per_slice, topology.devices_per_slice) == ("tpu7x:2x2x1", 4, 8)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5p:4x4x5", "topology v5p:4x4x5 does not exist: 80 chips; nearest: v5p:4x4x4, 64 chips"),
        ("v5p:4x2x4", "topology v5p:4x2x4 does not exist: 32 chips; nearest: v5p:2x4x4, 32 chips"),
        ("v5e:3x3", "topology v5e:3x3 does not exist: 9 chips; nearest: v5e:2x4, 8 chips"),
        (
            "v5p-65",
            "topology v5p-65 does not exist: 32.5 chips (65 TensorCores, 2 to a chip); nearest: v5p:2x4x4, 32 chips",
        ),
        ("v6e-512", "topology v6e-512 does not exist: 512 chips; nearest: v6e:16x16, 256 chips"),
        ("v5e-0", "topology v5e-0 does not exist: 0 chips; nearest: v5e:1x1, 1 chips"),
        ("v5x:2x2", "topology v5x:2x2: there is no v5x; nearest: v5p (known: v5p, v5e, v6e, tpu7x)"),
        (
            "h100x16",
            "topology h100x16: a host has 1, 2, 4 or 8 GPUs, without a shape; nearest: h100x8; several hosts are 2xh100x8",
        ),
        ("h100:2x2", "topology h100:2x2: a host has 1, 2, 4 or 8 GPUs, without a shape; nearest: h100x4"),
        ("p100x8", "topology p100x8: there is no p100; nearest: h100 (known: a100, h100, h200, b200, l4, l40s, rtx4090, mi300x)"),
        ("0xv5p:4x4x4", "topology 0xv5p:4x4x4 has 0 slices; use at least 1"),
        ("1000000xv5p:4x4x4", "topology 1000000xv5p:4x4x4 has 64,000,000 chips; the limit is 1,048,576; plan for fewer slices"),
    ],
)
def test_what_does_not_exist(name: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_topology(name)
    assert str(error.value) == said


@pytest.mark.parametrize("name", ["", "v5p", "64", "v5p:", "v5p:4x4x", "v5p 4x4x4", "x8", "2x", "v5p:4x4x4\n"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a topology; examples: v5p:4x4x4"):
        parse_topology(name)


def test_larger_slices_are_whole_cubes() -> None:
    assert all(side % 4 == 0 for shape in list(slice_shapes("v5p"))[4:] for side in shape)
    assert (16, 16, 24) in set(slice_shapes("v5p"))
    assert (4, 4, 28) not in set(slice_shapes("v5p"))
