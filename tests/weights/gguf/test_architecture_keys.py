"""Keys that are read, missing, per layer or left over."""

from __future__ import annotations

import numpy as np
import pytest

from moe_train.weights.gguf.architecture_keys import ArchitectureKeys


def test_keys_that_were_not_read_are_listed() -> None:
    keys = ArchitectureKeys("llama", {"llama.a": 1, "llama.b": 2, "general.c": 3})
    assert keys.get("a") == 1 and keys.get("d", 4) == 4
    assert keys.unread() == ["llama.b"]
    with pytest.raises(ValueError, match=r"the key llama.d is missing; convert the model again"):
        keys.get("d")


def test_a_value_for_each_layer_is_read_if_they_agree() -> None:
    keys = ArchitectureKeys("llama", {"llama.a": np.array([3, 3], np.uint32), "llama.b": np.array([3, 4], np.uint32)})
    assert keys.get("a") == 3
    with pytest.raises(ValueError, match="differs between layers"):
        keys.get("b")


def test_float32_is_read_as_the_shortest_decimal() -> None:
    assert ArchitectureKeys("llama", {"llama.a": float(np.float32(1e-5))}).get_float("a") == 1e-5
