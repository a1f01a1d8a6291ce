"""The table of accelerators against what JAX calls them, and the measured peak of a CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from moe_train.machine import devices


def device(kind: str) -> Any:
    return SimpleNamespace(platform="tpu", device_kind=kind, process_index=0)


@pytest.mark.parametrize(
    ("kind", "name", "teraflops"),
    [
        ("TPU v4", "v4", 275),
        ("TPU v5 lite", "v5e", 197),
        ("TPU v5", "v5p", 459),
        ("TPU v6 lite", "v6e", 918),
        ("TPU7x", "tpu7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", "a100", 312),
        ("NVIDIA H100 80GB HBM3", "h100", 989),
        ("NVIDIA H100 PCIe", "h100 pcie", 756),
        ("NVIDIA L40S", "l40s", 362),
        ("NVIDIA L40", "l40", 181),
        ("NVIDIA L4", "l4", 121),
        ("NVIDIA GeForce RTX 4090", "rtx4090", 165),
        ("AMD Instinct MI300X", "mi300x", 1307),
    ],
)
def test_known_chips(kind: str, name: str, teraflops: float) -> None:
    assert devices.chip_name(device(kind)) == name
    assert devices.peak_flops([device(kind)] * 4)[0] == 4 * teraflops * 1e12


def test_plans_are_for_chips_with_all_figures() -> None:
    assert devices.CHIPS.keys() - devices.DEVICES.keys() == {"v4", "h100 pcie", "l40"}


def test_the_peak_of_an_unknown_chip_is_not_invented() -> None:
    assert devices.peak_flops([device("Abacus 9")]) == (None, "no figure for Abacus 9")


def test_the_peak_of_a_cpu_is_measured_once_for_its_fake_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "measured_matmul_flops", lambda: 1e11)
    assert devices.peak_flops(jax.devices())[0] == 1e11


def test_measured_product() -> None:
    assert 1e8 < devices.measured_matmul_flops(128) < 1e14
