"""Stacks of layers: which layer's weights lie where."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train import config

MOE = {"name": "moe", "ffn_dim": 8, "num_experts": 4, "experts_per_token": 2}
DENSE_FIRST = {**MOE, "dense_layers": {"count": 2, "ffn_dim": 24}}


def model(
    ffn: dict[str, Any], family: str = "mixtral", num_layers: int = 6, windows: tuple[int | None, ...] = (None,)
) -> config.Model:
    attention = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "windows": windows}
    tree = {"family": family, "vocab_size": 8, "model_dim": 8, "num_layers": num_layers, "attention": attention, "ffn": ffn}
    return config.Model.model_validate(tree)


def test_a_model_of_alike_layers_is_one_stack() -> None:
    (stack,) = config.stacks(model(MOE))
    assert (stack.first_layer, stack.repeats, stack.period, stack.is_sparse) == (0, 6, 1, True)


def test_interleaved_windows_are_one_stack_with_a_longer_period() -> None:
    dense = model({"name": "dense", "ffn_dim": 8}, "ministral", windows=(8, 8, None))
    (stack,) = config.stacks(dense)
    assert (stack.repeats, stack.windows) == (2, (8, 8, None))
    assert [(p.layer, p.place, p.repeat) for p in config.layers(dense)][:4] == [(0, 0, 0), (1, 1, 0), (2, 2, 0), (3, 0, 1)]
    assert config.sparse_layers(dense) == []


def test_dense_first_layers_are_a_stack_of_their_own() -> None:
    sparse = model(DENSE_FIRST)
    first, others = config.stacks(sparse)
    assert (first.first_layer, first.num_layers, first.ffn) == (0, 2, config.DenseFfn(name="dense", ffn_dim=24))
    assert (others.first_layer, others.num_layers, others.ffn) == (2, 4, sparse.ffn)
    assert [(p.layer, p.stack, p.repeat) for p in config.layers(sparse)] == [
        *((0, 0, 0), (1, 0, 1)),
        *((2, 1, 0), (3, 1, 1), (4, 1, 2), (5, 1, 3)),
    ]
    assert config.sparse_layers(sparse) == [2, 3, 4, 5]


def test_dense_first_layers_are_whole_periods() -> None:
    with pytest.raises(ValueError, match=r"ffn\.dense_layers\.count 2 is not a multiple of the 3 attention\.windows"):
        model(DENSE_FIRST, windows=(8, 8, 8))


def test_a_dump_names_dense_first_layers_only_where_there_are_some() -> None:
    assert "dense_layers" not in model(MOE).model_dump_json()
    assert config.Model.model_validate_json(model(DENSE_FIRST).model_dump_json()) == model(DENSE_FIRST)
