"""Settings that do not select the modules of an adapter's tensors, as PEFT decides it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.weights.peft.selected import check_ranks, num_modules, unselected_modules

Q, OUT = (f"model.layers.{layer}.self_attn.{leaf}" for layer, leaf in ((0, "q_proj"), (1, "o_proj")))
EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1"
TENSORS = [f"base_model.model.{module}.lora_{x}.weight" for module in (Q, OUT, EXPERT) for x in "AB"]


@pytest.mark.parametrize(
    ("settings", "unselected"),
    [
        ({"target_modules": ["q_proj", "o_proj"]}, []),
        ({"target_modules": ["q_proj"]}, [OUT]),
        ({"target_modules": ["self_attn.q_proj", OUT]}, []),
        ({"target_modules": ["proj"]}, [Q, OUT]),  # ends of names from a dot on
        ({"target_modules": "all-linear"}, []),
        ({"target_modules": r".*\.(q|o)_proj"}, []),
        ({"target_modules": r"q_proj"}, [Q, OUT]),  # of the whole name
        ({"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["o_proj"]}, [OUT]),
        ({"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*\.1\..*"}, [OUT]),
        ({"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0]}, [OUT]),
        ({"target_modules": ["q_proj", "o_proj"], "layers_to_transform": 1}, [Q]),
        ({"target_modules": ["q_proj", "o_proj"], "layers_to_transform": []}, []),
        ({"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"}, []),
        ({"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["h"]}, [Q, OUT]),
        ({"target_modules": [], "target_parameters": ["self_attn.q_proj.weight"]}, [OUT]),
        ({"target_modules": None}, [Q, OUT]),
    ],
)
def test_modules_that_the_settings_do_not_select_are_named(settings: dict[str, Any], unselected: list[str]) -> None:
    assert unselected_modules(TENSORS, settings) == sorted(unselected) and num_modules(TENSORS) == 3


def test_both_ends_of_a_tied_table_are_selected_by_one() -> None:
    tensors = ["base_model.model.lm_head.lora_A.weight", "base_model.model.model.embed_tokens.lora_embedding_A"]
    settings = {"target_modules": ["embed_tokens"]}
    assert unselected_modules(tensors, settings) == ["lm_head"]
    assert unselected_modules(tensors, settings | {"ensure_weight_tying": True}) == []


class Tensor:
    """A tensor of some shape."""

    name, dtype = "", np.dtype(np.float32)

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def read(self, index: Any = ()) -> np.ndarray:
        raise AssertionError("ranks are in the headers")


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"r": 2, "rank_pattern": {"o_proj": 3}}, None),
        ({"r": 3, "rank_pattern": {r"model\.layers\.0\..*": 2}}, None),
        ({"r": 2}, "o_proj.lora_A.weight has rank 3, but .* state 2"),
        ({"r": 64, "rank_pattern": {"o_proj": 3}}, "q_proj.lora_A.weight has rank 2, but .* state 64"),
        ({"r": 2, "rank_pattern": {"o_proj": 3, "w1": 4}}, "experts.0.w1.lora_A.weight has rank 2, but .* state 4"),
        ({}, "has rank 2, but .* state 8"),  # PEFT's default
    ],
)
def test_other_ranks_than_the_settings_state_are_refused(settings: dict[str, Any], refused: str | None) -> None:
    shapes = {Q: 2, OUT: 3, EXPERT: 2}
    tensors = {f"base_model.model.{module}.lora_A.weight": Tensor(rank, 8) for module, rank in shapes.items()}
    tensors |= {f"base_model.model.{module}.lora_B.weight": Tensor(8, rank) for module, rank in shapes.items()}
    if refused is None:
        check_ranks(Path("file"), tensors, settings)
        return
    with pytest.raises(ValueError, match=refused):
        check_ranks(Path("file"), tensors, settings)
