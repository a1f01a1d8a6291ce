"""Merged matrices against sums by hand; the proof compares those of whole exports (hf/test_files.py)."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from moe_train.model.parameters import Parameters
from moe_train.weights import merge, names
from moe_train.weights.names import WeightPiece
from tests.random_parameters import random_parameters
from tests.tiny import LORA, MIXTRAL, ONE

Q, DOWN = "stacks.0.layers.0.attention.q_proj", "stacks.0.layers.0.ffn.down_proj"


@pytest.fixture(scope="module")
def weights() -> Parameters:
    with jax.set_mesh(ONE):
        return random_parameters(MIXTRAL, lora=LORA)


def piece_of(path: str, *lead: int) -> WeightPiece:
    (found,) = (piece for piece in names.weight_pieces(MIXTRAL) if (piece.path, piece.lead) == (path, lead))
    return found


def float64(weights: Parameters, path: str, *lead: int) -> np.ndarray:
    return np.asarray(weights[path], np.float64)[lead]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_base_and_delta_are_rounded_once(weights: Parameters, dtype: str) -> None:
    a, b = (float64(weights, f"{Q}.lora_{x}", 1) for x in "ab")
    delta = 1.5 * np.einsum("dj,jnh->dnh", a, b)
    piece = piece_of(f"{Q}.weight", 1)
    np.testing.assert_allclose(merge.lora_delta(weights, LORA, piece), delta, rtol=1e-12, atol=1e-15)
    found = merge.merged(weights, LORA, piece, np.dtype(dtype))
    assert found.dtype == dtype
    assert np.array_equal(found, (float64(weights, f"{Q}.weight", 1) + delta).astype(dtype))


def test_an_expert_has_its_own_delta(weights: Parameters) -> None:
    a, b = (float64(weights, f"{DOWN}.lora_{x}", 2, 3) for x in "ab")
    np.testing.assert_allclose(merge.lora_delta(weights, LORA, piece_of(f"{DOWN}.weight", 2, 3)), 2 * a @ b, rtol=1e-12, atol=1e-15)


def test_a_weight_without_adapter_keeps_its_bits(weights: Parameters) -> None:
    piece = piece_of("head.weight")
    assert merge.lora_delta(weights, LORA, piece) is None
    assert np.array_equal(merge.merged(weights, LORA, piece, np.dtype("float32")), np.asarray(weights["head.weight"]))


def test_an_adapter_without_an_alpha_is_refused(weights: Parameters) -> None:
    with pytest.raises(ValueError, match=rf"{Q} has an adapter, but its alpha is unknown; pass the config's section `lora`"):
        merge.merged(weights, None, piece_of(f"{Q}.weight", 0), np.dtype("float32"))


def test_scales_of_experts_that_differ() -> None:
    own = LORA.targets[1].model_copy(update={"experts": (1,), "alpha": 12.0})
    rest = LORA.targets[1].model_copy(update={"experts": (0, 2, 3)})
    lora = LORA.model_copy(update={"targets": (LORA.targets[0], own, rest)})
    assert [merge.scale_of(lora, DOWN, (0, e)) for e in range(4)] == [2.0, 4.0, 2.0, 2.0]
    assert merge.scale_of(lora, Q) == 1.5 and merge.target_of(lora, DOWN) == own
