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
        ({"targets": [TARGET | {"experts": [1, 1]}]}, "experts [1, 1] lists an expert twice"),
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


LORA = config.Lora(
    targets=(
        config.LoraTarget(modules=("attention.*", "ffn.up_proj"), rank=2, alpha=2.0),
        config.LoraTarget(modules=("ffn.down_proj",), rank=4, alpha=2.0, experts=(0,)),
        config.LoraTarget(modules=("ffn.down_proj",), rank=8, alpha=2.0, experts=(1, 2)),
    ),
    train=("*_norm", "ffn.router"),
)


@pytest.mark.parametrize(
    ("module", "routed", "ranks"),
    [
        ("attention.q_proj", False, [2]),
        ("ffn.up_proj", True, [2]),
        ("ffn.up_proj", False, [2]),
        ("ffn.down_proj", True, [4, 8]),
        ("ffn.down_proj", False, []),  # a dense layer has no experts to name
        ("ffn.gate_proj", True, []),
    ],
)
def test_targets_of_a_module(module: str, routed: bool, ranks: list[int]) -> None:
    assert [target.rank for target in LORA.targets_of(module, routed=routed)] == ranks


@pytest.mark.parametrize(("module", "is_trained"), [("ffn_norm", True), ("ffn.router", True), ("attention.q_proj", False)])
def test_modules_that_are_trained_in_full(module: str, is_trained: bool) -> None:
    assert LORA.trains_in_full(module) is is_trained


def test_no_wildcard_reaches_routers_and_ends() -> None:
    assert not any(config.names_module("*", module) for module in config.NAMED_IN_FULL)
    assert config.names_module("*", "ffn.gate_proj")
