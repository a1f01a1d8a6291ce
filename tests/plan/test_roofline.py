"""The roofline of a step: sums by hand."""

from __future__ import annotations

import dataclasses

import pytest

from moe_train import config
from moe_train.machine.devices import DEVICES
from moe_train.plan.roofline import Time, Work, step_time, step_work
from moe_train.plan.topology import parse_topology
from moe_train.plan.traffic import Flow, flows
from moe_train.plan.weights import layout
from tests.plan.pretraining import LATENT, SMALL, pretrain_run

NOTHING = Work(0, 0, 0, 0, 0)


def small(*overrides: str) -> config.Run:
    return pretrain_run(*SMALL, *overrides)


@pytest.mark.parametrize(
    ("parts", "step", "binds"),
    [
        ((3, 1, 2, 0, 0, 0), 3, "compute"),
        ((1, 3, 2, 0, 0, 0), 3, "HBM"),
        ((3, 1, 2, 2, 0, 0), 5, "network"),  # 2 overlap, 2 are waited for
        ((3, 1, 0, 0, 2, 3), 6, "DCN"),
    ],
)
def test_the_slowest_overlapping_part_counts_and_waiting_adds_up(parts: tuple[float, ...], step: float, binds: str) -> None:
    found = Time(*parts)
    assert (found.step, found.binds) == (step, binds)


def test_each_part_is_its_work_over_the_peak() -> None:
    device = dataclasses.replace(DEVICES["h100"], flops={"bfloat16": 10.0}, hbm_bandwidth=5.0, link_bandwidth=2.0)
    moved = [Flow("weights", "all-gather", "fsdp", 6.0, True), Flow("tokens to experts", "all-to-all", "expert", 8.0, False)]
    done = NOTHING._replace(flops=20.0, hbm_bytes=15.0)
    assert step_time(done, moved, small("mesh.fsdp=4", "mesh.expert=2"), parse_topology("h100x8"), device) == Time(
        2.0, 3.0, 3.0, 4.0, 0.0, 0.0
    )


@pytest.mark.parametrize(
    ("chip", "kind", "axis", "hidden"),
    [
        ("v5p", "all-gather", "fsdp", True),
        ("v5p", "all-gather", "expert", False),
        ("v6e", "all-gather", "fsdp", False),
        ("v5p", "reduce-scatter", "fsdp", True),
        ("v5p", "reduce-scatter", "expert", False),
        ("v5p", "all-reduce", "data", True),
        ("v6e", "all-reduce", "data", False),
        ("v6e", "reduce-scatter", "fsdp", False),
        ("h100", "all-gather", "fsdp", True),
    ],
)
def test_only_what_compiled_programs_start_early_is_hidden(chip: str, kind: str, axis: str, hidden: bool) -> None:
    topology = parse_topology({"v5p": "v5p:2x2x2", "v6e": "v6e:2x4", "h100": "h100x8"}[chip])
    flow = Flow("weights", kind, axis, 1e9, True)
    time = step_time(NOTHING, [flow], small("mesh.fsdp=4", "mesh.expert=2"), topology, DEVICES[chip])
    assert (time.network > 0, time.waited > 0) == (hidden, not hidden)
    # What products wait for is never hidden.
    assert step_time(NOTHING, [flow._replace(overlaps=False)], small("mesh.fsdp=8"), topology, DEVICES[chip]).network == 0


@pytest.mark.parametrize(
    ("topology", "overrides"),
    [("v5p:2x2x4", ("train.microbatches=2", "train.batch_size=32")), ("2xv5p:2x2x2", ("train.batch_size=32",))],
)
def test_a_sum_after_the_last_product_or_between_slices_is_waited_for(topology: str, overrides: tuple[str, ...]) -> None:
    flow = Flow("gradients", "all-reduce", "data", 1e9, True)
    time = step_time(NOTHING, [flow], small("mesh.data=2", "mesh.fsdp=8", *overrides), parse_topology(topology), DEVICES["v5p"])
    assert time.waited + time.dcn_waited > 0
    assert time.network == time.dcn == 0


def test_a_part_of_what_is_gathered_over_a_whole_slice_is_waited_for() -> None:
    flow = Flow("weights", "all-gather", "fsdp", 1e9, True)
    time = step_time(NOTHING, [flow], small("mesh.fsdp=8"), parse_topology("v5p:2x2x2"), DEVICES["v5p"])
    assert time.network == pytest.approx(1.5 * time.waited)


def test_what_crosses_hosts_goes_over_the_slow_network() -> None:
    """Of an all-gather of 16 over two hosts of 8, half of a whole, shared by 8 devices, comes from outside: a sixteenth."""
    run, device = small("mesh.fsdp=16"), dataclasses.replace(DEVICES["h100"], link_bandwidth=1.0, dcn_bandwidth=1.0)
    found = step_time(NOTHING, [Flow("weights", "all-gather", "fsdp", 15.0, True)], run, parse_topology("2xh100x8"), device)
    assert (found.network, found.dcn) == (14.0, 1.0)


def test_rematerialization_adds_flops_and_no_useful_ones() -> None:
    place = parse_topology("v5p:2x2x2")
    full, minimal = (
        step_work(run, layout(run), flows(run, layout(run)), place)
        for run in (small(f"compute.remat={r}") for r in ("full", "minimal"))
    )
    assert full.model_flops == minimal.model_flops == minimal.flops < full.flops < 4 / 3 * minimal.flops
    assert full.hbm_bytes > minimal.hbm_bytes and full.dcn_bytes == 0


def test_each_device_of_context_expands_the_latents_of_the_whole_sequence() -> None:
    run = pretrain_run(*SMALL, LATENT, "compute.remat=minimal", "mesh={fsdp: 2, context: 4}", "train.seq_len=128")
    work = step_work(run, layout(run), [], parse_topology("v5p:2x2x2"))
    product = 2 * 48 * 8 * (64 + 64)  # of the latents and the keys without their rotary part, and the values, of 8 heads
    tokens = 16 * 128 / 8
    # Four products, of which three are of the device's own tokens, in two layers.
    assert work.flops - work.model_flops == tokens * 2 * product * (4 * 4 - 3)
