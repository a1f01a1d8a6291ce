"""A model that the host's memory has no room for is refused in one line, before anything is read or written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.commands.train import train
from moe_train.machine import host_memory
from moe_train.machine.mesh import make_mesh


def test_what_every_device_holds_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with jax.set_mesh(make_mesh(config.Mesh(fsdp=2, tensor=4))):
        halves = jax.eval_shape(lambda: jax.numpy.zeros((16, 32), "bfloat16", out_sharding=P("fsdp", None)))
        monkeypatch.setattr(host_memory, "available_memory", lambda: 4 * 16 * 32 * 2)  # each half on four devices
        host_memory.check_host_memory({"weight": halves}, "it")
        monkeypatch.setattr(host_memory, "available_memory", lambda: 4 * 16 * 32 * 2 - 1)
        with pytest.raises(ValueError, match=r"it needs 3.81e-06 GiB .* has 3.81e-06 GiB available; use a machine"):
            host_memory.check_host_memory({"weight": halves}, "it")


def test_a_run_without_room_is_refused_before_anything_is_written(
    small_run: Callable[..., config.Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "available_memory", lambda: 10_000)
    with pytest.raises(ValueError, match=r"small needs .* GiB of memory for its weights") as error:
        train(small_run(tmp_path / "run"))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is available")
def test_linux_says_what_is_available_and_a_container_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = host_memory.available_memory()
    assert here is not None and 2**20 < here < 2**50
    (tmp_path / "of_version_2").write_text("max\n")
    (tmp_path / "of_version_1").write_text("12345\n")
    monkeypatch.setattr(
        host_memory, "LIMITS", (str(tmp_path / "of_version_2"), str(tmp_path / "none"), str(tmp_path / "of_version_1"))
    )
    assert host_memory.available_memory() == 12345
