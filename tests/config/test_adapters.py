"""The section of adapters: what it must state, its scale, and whether it trains the router."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train import config
from tests.config.tiny import refusal

TARGET = {"modules": ["attention.*"], "rank": 4, "alpha": 8.0}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": []}, "lora has no targets; state at least one, or init_from"),
        ({"targets": [TARGET | {"experts": [1, 1]}]}, "experts [1, 1] names one twice"),
        ({"targets": [TARGET], "quantize": {"name": "nf4", "block_size": 6}}, "multiple of 4"),
    ],
)
def test_a_value_beyond_its_limit_is_refused(lora: dict[str, Any], message: str) -> None:
    assert message in refusal(lora=lora)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_the_scale_divides_alpha_by_the_rank_or_by_its_root(rslora: bool, scale: float) -> None:
    target = config.LoraTarget(modules=("embed",), rank=4, alpha=8.0)
    assert config.Lora(targets=(target,), rslora=rslora).scale(target) == scale


@pytest.mark.parametrize(
    ("modules", "train", "trains_router"),
    [(("ffn.*",), (), False), (("ffn.router",), (), True), (("attention.*",), ("ffn.router",), True)],
)
def test_the_router_is_trained_only_where_it_is_named(
    modules: tuple[str, ...], train: tuple[str, ...], trains_router: bool
) -> None:
    lora = config.Lora(targets=(config.LoraTarget(modules=modules, rank=4, alpha=8.0),), train=train)
    assert lora.trains_router == trains_router
