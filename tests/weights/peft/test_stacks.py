"""Stacks of adapters: which matrices share a target, and what is padded and scaled where layers or experts differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train import config
from moe_train.weights import names
from moe_train.weights.peft import stacks
from moe_train.weights.peft.pieces import adaptable_pieces, matrix_for_each_expert
from tests.tiny import MISTRAL4
from tests.weights.peft.adapters import MIXTRAL

SETTINGS = {"lora_alpha": 4, "alpha_pattern": {}}


class Tensor:
    """A tensor of which only the shape is looked at."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


def stacks_of(model: config.Model, ranks: dict[str, int], settings: dict[str, Any] = SETTINGS) -> stacks.Stacks:
    """The stacks of a file with adapters of these ranks, by the names of modules within layers such as `0.self_attn.q_proj`."""
    layout = matrix_for_each_expert(names.HUGGING_FACE, model)
    tensors: dict[str, Any] = {}
    for name, rank in ranks.items():
        stem = f"base_model.model.model.layers.{name}"
        tensors |= {f"{stem}.lora_A.weight": Tensor((rank, 8)), f"{stem}.lora_B.weight": Tensor((8, rank))}
    return stacks.stacks_of(Path("adapter"), settings, tensors, adaptable_pieces(model, layout))


def target(module: str, rank: int, alpha: float, experts: tuple[int, ...] | None = None) -> config.LoraTarget:
    return config.LoraTarget(modules=(module,), rank=rank, alpha=alpha, experts=experts)


def test_equal_layers_need_no_padding() -> None:
    read = stacks_of(MIXTRAL, {"0.self_attn.q_proj": 2, "1.self_attn.q_proj": 2})
    assert read == stacks.Stacks((target("attention.q_proj", 2, 4.0),), {}, frozenset())


def test_a_stack_has_the_largest_rank_and_the_most_common_scale() -> None:
    three = MIXTRAL.model_copy(update={"num_layers": 3})
    ranks = {"0.self_attn.q_proj": 2, "1.self_attn.q_proj": 4, "2.self_attn.q_proj": 2}
    read = stacks_of(three, ranks)
    assert read.targets == (target("attention.q_proj", 4, 8.0),)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    assert read.factors_of_b == {name: 0.5} and read.padded == {"attention.q_proj"}
    stabilized = stacks_of(three, ranks, SETTINGS | {"use_rslora": True})
    assert stabilized.targets[0].alpha == pytest.approx(4 * 2**0.5)
    assert stabilized.factors_of_b[name] == pytest.approx(2**-0.5)


def test_a_layer_without_an_adapter_is_padded() -> None:
    read = stacks_of(MIXTRAL, {"1.self_attn.q_proj": 2})
    assert read == stacks.Stacks((target("attention.q_proj", 2, 4.0),), {}, frozenset({"attention.q_proj"}))


def test_experts_alone_leave_dense_layers_without_an_adapter() -> None:
    """Layer 0 is dense; a target that names all experts skips it."""
    experts = range(MISTRAL4.ffn.num_experts)
    ranks = {f"{layer}.mlp.experts.{e}.down_proj": 2 for layer in (1, 2) for e in experts}
    read = stacks_of(MISTRAL4, ranks)
    assert read.targets == (target("ffn.down_proj", 2, 4.0, tuple(experts)),)
    with_dense = stacks_of(MISTRAL4, ranks | {"0.mlp.down_proj": 2})
    assert with_dense == stacks.Stacks((target("ffn.down_proj", 2, 4.0),), {}, frozenset())
    other_dense = stacks_of(MISTRAL4, ranks | {"0.mlp.down_proj": 3})
    assert other_dense.targets == (target("ffn.down_proj", 3, 6.0),) and other_dense.padded == {"ffn.down_proj"}
    np.testing.assert_allclose(other_dense.factors_of_b["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"], 2 / 3)


def test_half_an_adapter_and_none_are_refused() -> None:
    with pytest.raises(ValueError, match="has no adapter under a name that PEFT reads"):
        stacks_of(MIXTRAL, {})
    layout = matrix_for_each_expert(names.HUGGING_FACE, MIXTRAL)
    tensors: Any = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": Tensor((2, 8))}
    with pytest.raises(ValueError, match=r"lacks .*q_proj\.lora_B\.weight"):
        stacks.stacks_of(Path("adapter"), SETTINGS, tensors, adaptable_pieces(MIXTRAL, layout))
