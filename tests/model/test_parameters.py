"""A model as a flat dict of arrays, and settings that its structure carries."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.model.parameters import (
    Parameters,
    combine,
    combine_some,
    initial_parameters,
    parameters,
    with_capacity,
    with_expert_ids,
    without_adapters,
)
from moe_train.model.transformer import abstract_model, init_model
from tests.random_parameters import assert_equal, random_parameters
from tests.tiny import LORA, MIXTRAL, ONE

GATE = "stacks.0.layers.0.ffn.gate_proj"


@pytest.fixture(scope="module")
def structure() -> Any:
    with jax.set_mesh(ONE):
        return parameters(abstract_model(MIXTRAL, config.Compute(), LORA))[0]


@pytest.fixture(scope="module")
def weights() -> Parameters:
    with jax.set_mesh(ONE):
        return random_parameters(MIXTRAL, lora=LORA)


def without(weights: Parameters, part: str) -> Parameters:
    return {path: array for path, array in weights.items() if part not in path}


def ffn_of(model: Any) -> Any:
    return model.stacks[0].layers[0].ffn


def test_a_model_comes_back_from_its_parts(structure: Any, weights: Parameters) -> None:
    frozen = without(weights, ".lora_")
    adapters = {path: array for path, array in weights.items() if path not in frozen}
    model = combine(structure, frozen, adapters)
    assert ffn_of(model).gate_proj.weight[...] is weights[f"{GATE}.weight"]
    assert parameters(model)[0] == structure
    assert_equal(parameters(model)[1], weights)


def test_a_missing_parameter_is_an_error_unless_some_are_asked_for(structure: Any, weights: Parameters) -> None:
    some = without(weights, f"{GATE}.weight")
    with pytest.raises(KeyError, match=rf"{GATE}\.weight"):
        combine(structure, some)
    assert_equal(parameters(combine_some(structure, some))[1], some)


def test_expert_ids_are_kept_where_they_are_asked_for(structure: Any, weights: Parameters) -> None:
    keeps_ids = [ffn_of(combine(s, weights)).keeps_expert_ids for s in (structure, with_expert_ids(structure))]
    assert keeps_ids == [False, True]


def test_a_model_without_its_adapters(structure: Any, weights: Parameters) -> None:
    plain = combine(without_adapters(structure), weights)
    assert_equal(parameters(plain)[1], without(weights, ".lora_"))


def test_a_capacity_is_part_of_the_structure(structure: Any, weights: Parameters) -> None:
    limited = with_capacity(structure, 1.5)
    assert ffn_of(combine(limited, weights)).capacity_factor == 1.5
    assert limited != structure and with_capacity(limited, None) == structure


@pytest.mark.slow
def test_initial_parameters_have_the_bits_of_a_program_with_all_optimizations() -> None:
    """Their own program is compiled with fewer, which takes a third of the time."""
    with jax.set_mesh(ONE):
        # Tests compile with fewer by default.
        options: dict[str, int | bool] = {"xla_backend_optimization_level": 3}
        if jax.__version_info__ < (0, 12):
            options["xla_cpu_use_fusion_emitters"] = True
        plain = jax.jit(lambda: parameters(init_model(3, MIXTRAL, config.Compute(), LORA))[1], compiler_options=options)()
        paths = plain.keys() - {f"{GATE}.weight"}
        initial = initial_parameters(lambda: init_model(3, MIXTRAL, config.Compute(), LORA), paths)
    assert initial.keys() == paths
    for path in paths:
        np.testing.assert_array_equal(initial[path], plain[path], strict=True)
