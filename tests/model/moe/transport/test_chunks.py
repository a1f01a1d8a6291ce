"""Sizes of buckets by hand, and sums over chunks against one sum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from moe_train.model.moe.transport.chunks import ChunkInputs, ChunkRouting, bucket_size, sum_over_chunks
from moe_train.model.moe.transport.transport import ExchangeSizes
from tests.tiny import ONE


@pytest.mark.parametrize(
    ("tokens", "peer_capacity", "rows"),
    [
        (4096, None, 1280),  # 8192 assignments to 8 devices, and a quarter more
        (4096, 1000, 1024),  # tiles of 512 rows, of which 64 are for each device
        (4096, 5000, 1280),
        (8, None, 4),  # 16 assignments: 2.5 for each device, in units of 2
    ],
)
def test_bucket_size(tokens: int, peer_capacity: int | None, rows: int) -> None:
    sizes = ExchangeSizes(tokens, 64, experts_per_token=2, devices=8, peer_capacity=peer_capacity)
    assert bucket_size(sizes) == rows


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_a_sum_over_chunks_and_its_gradients(num_chunks: int) -> None:
    """Chunk i adds (i + 1) * weight * x * (2 * expert); 2 * expert stands for the unsharded weights."""

    def compute_chunk(i: jax.Array, inputs: ChunkInputs, routing: ChunkRouting) -> jax.Array:
        return (i + 1) * inputs.weights_mA * inputs.x_mD * inputs.experts

    @jax.jit
    @jax.shard_map(in_specs=P(), out_specs=P(), check_vma=False)
    def gradients(x: jax.Array, weight: jax.Array, expert: jax.Array, num_chunks: jax.Array) -> tuple[jax.Array, ...]:
        routing = ChunkRouting((), num_chunks, None)

        def summed(x: jax.Array, weight: jax.Array, expert: jax.Array) -> jax.Array:
            inputs = ChunkInputs(x, weight, expert)
            return jnp.sum(sum_over_chunks(compute_chunk, lambda expert: 2 * expert, inputs, routing))

        return jax.value_and_grad(summed, argnums=(0, 1, 2))(x, weight, expert)

    with jax.set_mesh(ONE):
        value, (dx, dweight, dexpert) = gradients(jnp.full((1, 1), 3.0), jnp.full((1, 1), 5.0), jnp.array(7.0), num_chunks)
    factor = 2 * sum(range(1, num_chunks + 1))
    assert [float(x.squeeze()) for x in (value, dx, dweight, dexpert)] == [factor * n for n in (105, 35, 21, 15)]
