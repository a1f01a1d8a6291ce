"""Partition specs of weights and activations, on a mesh of eight devices."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train.machine.mesh import BATCH
from moe_train.model.sharding import specs
from tests.tiny import EIGHT


@pytest.fixture(autouse=True)
def mesh() -> Iterator[None]:
    with jax.set_mesh(EIGHT):  # fsdp, expert, tensor: two of each
        yield


def test_letters_give_the_spec_of_an_activation() -> None:
    assert specs.activation_spec("BTNH") == P(BATCH, "context", "tensor", None)
    assert specs.activation_spec("BTD") == P(BATCH, "context", None)


def test_a_gathered_weight_loses_the_axes_that_split_it_for_storage_alone() -> None:
    stored = P("fsdp", specs.TENSOR_AND_EXPERT, None)
    assert specs.gathered_spec(stored) == P(None, "tensor", None)
    assert specs.without_fsdp(stored) == P(None, specs.TENSOR_AND_EXPERT, None)


@pytest.mark.parametrize(("size", "axes"), [(8, specs.TENSOR_AND_EXPERT), (12, specs.TENSOR_AND_EXPERT), (6, "tensor")])
def test_heads_are_split_over_expert_too_where_it_divides_them(size: int, axes: object) -> None:
    assert specs.split_axes(size) == axes


def test_an_array_carries_its_spec_and_outside_of_a_local_view_there_is_one_replica() -> None:
    x = jax.device_put(jnp.zeros((4, 4)), NamedSharding(EIGHT, P("fsdp", "tensor")))
    assert specs.spec_of(x) == P("fsdp", "tensor")
    assert specs.replicas() == (1, 0) and specs.sum_over_replicas(x) is x
