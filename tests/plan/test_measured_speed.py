"""The calibrated speed is the measured share of the peak, and never above the roofline."""

from __future__ import annotations

import pytest

from moe_train.plan.choice import model_choice, share_of_peak
from moe_train.plan.compile import devices_of
from moe_train.plan.measured_speed import calibrated_speed, measured_share
from moe_train.plan.topology import parse_topology
from tests.plan.test_choice import SMALL, pretrain_run


def test_it_is_the_measured_share_or_the_roofline_if_that_is_slower() -> None:
    topology = parse_topology("h100x8")
    choice = model_choice(pretrain_run(*SMALL), topology)
    half = choice.run.compute.model_copy(update={"dtype": "bfloat16"})
    choice = choice._replace(run=choice.run.model_copy(update={"compute": half}))
    speed = calibrated_speed(choice, topology)
    assert speed is not None and speed.measured.is_sparse
    reached = share_of_peak(choice, topology) * speed.tokens_per_second / choice.tokens_per_second
    assert reached == pytest.approx(min(468 / 989, share_of_peak(choice, topology)))
    single = choice.run.compute.model_copy(update={"dtype": "float32"})
    assert calibrated_speed(choice._replace(run=choice.run.model_copy(update={"compute": single})), topology) is None


def test_a_device_without_a_published_figure_has_none() -> None:
    model = pretrain_run(*SMALL).model
    assert measured_share(model, "mi300x") is None
    dense = measured_share(model, "v5p")  # nobody has published one for experts
    assert dense is not None and not dense.is_sparse


def test_a_gpu_that_the_compiler_does_not_know_is_planned_without_it() -> None:
    with pytest.raises(ValueError, match=r"no description of l4, only of a100, .*; add --no-compile"):
        devices_of(parse_topology("l4x8"))
