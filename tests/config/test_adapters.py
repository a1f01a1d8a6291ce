"""Which modules the section `lora` names."""

from __future__ import annotations

import pytest

from moe_train import config

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
