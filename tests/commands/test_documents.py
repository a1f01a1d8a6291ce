"""Documents of an export: the parameters that they count are those in the files."""

from __future__ import annotations

import numpy as np

from moe_train.commands.documents import _num_parameters
from tests.commands.runs import LORA


def test_merged_adapters_are_no_parameters_of_their_own():
    place = "stacks.0.layers.0.attention.q_proj"
    weights = {f"{place}.weight": np.zeros(100), f"{place}.lora_a": np.zeros(7), f"{place}.lora_b": np.zeros(5)}
    assert _num_parameters(weights, LORA, merge=True) == 100
    assert _num_parameters(weights, LORA, merge=False) == 12
    assert _num_parameters(weights, None, merge=False) == 112
