"""The loop that both all-to-all transports share: assignments are sent in chunks of a fixed size until all are sent.

Buffers have a fixed size: one bucket of rows per other device, with a quarter more rows than balanced routing fills. What
does not fit is sent in a further chunk, and all devices do as many chunks as the fullest bucket of any of them needs. So
nothing is dropped whatever the routing, and balanced routing takes one chunk. The backward pass runs the same chunks again
from the layer's inputs, so no chunk keeps anything in memory.

Buffers for the worst case, compiled for 8 v5p chips (tests/benchmarks/buffers.py), would take 3.7 GiB in a layer where these
take 1.8, with 2.5 times the operations outside kernels and 3.2 times the bytes received. As the other branch of a `lax.cond`
they would rarely be used, but would still take the memory: 4.1 GiB.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_train.model.moe.transport.transport import DropoutCounters, ExchangeSizes
from moe_train.model.sharding.local_view import sum_along

SLACK = 1.25
"""Rows of a bucket, as a multiple of the rows that balanced routing fills."""


def bucket_size(sizes: ExchangeSizes) -> int:
    """Return the number of rows of one bucket: what a device can send to one other device in a chunk."""
    # All buckets together fill whole row tiles of the kernels.
    unit = max(1, min(512, sizes.assignments) // sizes.devices)
    rows = math.ceil(SLACK * sizes.assignments / sizes.devices)
    # With a capacity factor no peer can get more than `peer_capacity`, and a larger bucket would never be full.
    return -(-min(rows, sizes.peer_capacity or rows) // unit) * unit


class ChunkInputs(NamedTuple):
    """Differentiable inputs of a chunk."""

    x_mD: Float[Array, "m D"]
    weights_mA: Float[Array, "m A"]
    experts: Any
    """Weights of this device's experts: sharded over `fsdp` outside the loop over chunks, unsharded inside."""


class ChunkRouting(NamedTuple):
    """Destinations of the assignments and the number of chunks; not differentiable."""

    routes: Any
    """Pytree of integers, specific to the transport."""
    num_chunks: Int[Array, ""]
    """Number of chunks; the same on every device of a replica."""
    dropout_mA: DropoutCounters | None


ComputeChunk = Callable[[Int[Array, ""], ChunkInputs, ChunkRouting], Float[Array, "m D"]]
"""(index of the chunk, inputs with unsharded experts, routing) -> what the chunk adds to each token (m, D), in float32."""


def sum_over_chunks(
    compute_chunk: ComputeChunk, unshard: Callable[[Any], Any], inputs: ChunkInputs, routing: ChunkRouting
) -> Float[Array, "m D"]:
    """Sum the contributions of all chunks to each token, all-reduced over `tensor`.

    Args:
        compute_chunk: computes the contribution of one chunk.
        unshard: gathers the experts of `inputs` over `fsdp`; called once for all chunks.
        inputs: differentiable inputs.
        routing: destinations of the assignments, and the number of chunks.

    Returns:
        The sums (m, D), in the dtype of the tokens.
    """

    @jax.custom_vjp
    def total(inputs: ChunkInputs, routing: ChunkRouting) -> Float[Array, "m D"]:
        unsharded = inputs._replace(experts=unshard(inputs.experts))

        def add(i: Int[Array, ""], y_mD: Float[Array, "m D"]) -> Float[Array, "m D"]:
            return y_mD + compute_chunk(i, unsharded, routing)

        # `full_like` gives zeros that vary along the same mesh axes as x, as a loop's carry must from the start.
        return jax.lax.fori_loop(0, routing.num_chunks, add, jax.lax.full_like(inputs.x_mD, 0, jnp.float32))

    def forward(inputs: ChunkInputs, routing: ChunkRouting) -> tuple[Float[Array, "m D"], tuple[ChunkInputs, ChunkRouting]]:
        return total(inputs, routing), (inputs, routing)

    def backward(saved: tuple[ChunkInputs, ChunkRouting], dy_mD: Float[Array, "m D"]) -> tuple[ChunkInputs, None]:
        inputs, routing = saved
        # Gathered once here, and the sum of all chunks' gradients is scattered once at the end.
        experts, scatter_gradient = jax.vjp(unshard, inputs.experts)
        unsharded = inputs._replace(experts=experts)

        def add(i: Int[Array, ""], gradients: ChunkInputs) -> ChunkInputs:
            # The chunk is computed again here: JAX cannot reverse a loop whose number of iterations is dynamic.
            _, vjp = jax.vjp(lambda inputs: compute_chunk(i, inputs, routing), unsharded)
            (of_chunk,) = vjp(dy_mD)
            return jax.tree.map(jnp.add, gradients, of_chunk)

        zeros = jax.tree.map(lambda x: jax.lax.full_like(x, 0), unsharded)
        gradients = jax.lax.fori_loop(0, routing.num_chunks, add, zeros)
        (sharded,) = scatter_gradient(gradients.experts)
        return gradients._replace(experts=sharded), None

    total.defvjp(forward, backward)
    # Every chunk is a partial sum over F, which `tensor` splits; they are all-reduced once, after the loop.
    return sum_along(total(inputs, routing), "tensor").astype(inputs.x_mD.dtype)
