"""A run that cannot fit is refused before anything is allocated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moe_train import config
from moe_train.machine.devices import GIB
from moe_train.plan.fits import check_fits
from moe_train.plan.memory import memory
from moe_train.plan.weights import layout
from tests.plan.pretraining import pretrain_run

SMALL = ("model.num_layers=8", "model.model_dim=256", "model.ffn.ffn_dim=512", "model.vocab_size=512", "train.seq_len=512")
SMALL += ("model.attention={num_heads: 8, num_kv_heads: 2, head_dim: 32}", "train.batch_size=64", "train.microbatches=1")


def small(*overrides: str) -> config.Run:
    return pretrain_run(*SMALL, *overrides)


def device(limit: int | None, platform: str = "tpu", kind: str = "TPU v5 lite") -> Any:
    stats = None if limit is None else {"bytes_limit": limit}
    return SimpleNamespace(platform=platform, device_kind=kind, memory_stats=lambda: stats)


def test_the_refusal_names_the_numbers_and_what_fits() -> None:
    run = small("mesh.fsdp=8", "mesh.expert=1", "compute.remat=minimal")
    needed = memory(run, layout(run)).total
    limit = int(needed / 1.5)
    with pytest.raises(ValueError) as error:
        check_fits(run, device(limit))
    said = str(error.value)
    assert said.startswith(f"this run needs about {needed / GIB:.2f} GiB on each device, which has {limit / GIB:.2f}: ")
    assert "\n" not in said and "this fits: " in said
    fitting = small("mesh.fsdp=8", "mesh.expert=1", "compute.remat=minimal", *said.partition("this fits: ")[2].split())
    check_fits(fitting, device(limit))


def test_where_nothing_fits() -> None:
    with pytest.raises(ValueError, match="no mesh of these 8 devices is large enough: use more devices"):
        check_fits(small("mesh.fsdp=8", "mesh.expert=1"), device(1 << 20))


def test_an_unknown_device_is_refused_without_a_mesh() -> None:
    with pytest.raises(ValueError, match=r"use more devices, compute.remat full or more train.microbatches"):
        check_fits(small("mesh.fsdp=8", "mesh.expert=1"), device(1 << 20, "gpu", "Some GPU"))


@pytest.mark.parametrize("here", [device(1 << 50), device(None), device(1, "cpu")])
def test_what_fits_and_what_does_not_tell_its_memory_goes_on(here: Any) -> None:
    check_fits(small("mesh.fsdp=8", "mesh.expert=1"), here)
