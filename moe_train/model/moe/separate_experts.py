"""Apply experts whose matrices are separate arrays: the fast form for decoding on CPUs.

An expert of a stack is a slice, which XLA copies before the product. A token that is decoded has a row or two for an expert, so
that the copy costs as much as the product, whose time is that of reading the matrix from memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_train.model.moe.expert_weights import ExpertMatrix, ExpertWeights, InStack, SeparateExperts
from moe_train.model.moe.grouped_matmul import ROW_BLOCKS, over_blocks
from moe_train.model.moe.transport.transport import DropoutCounters
from moe_train.model.quantize import Quantized


def apply_separate_experts(
    x_RD: Float[Array, "R D"], group_sizes_e: Int[Array, " e"], experts: SeparateExperts, counters_R: DropoutCounters | None = None
) -> Float[Array, "R D"]:
    """Apply experts to rows in the order of their experts. See `transport.ApplyExperts`.

    Args:
        x_RD: rows.
        group_sizes_e: number of rows of each expert.
        experts: their weights; each is read once, and only if it has rows.
        counters_R: None, since nothing is dropped in decoding.

    Returns:
        The outputs (R, D), zeros past the last group.
    """
    assert counters_R is None
    R = x_RD.shape[0]
    starts_e = jnp.cumsum(group_sizes_e) - group_sizes_e
    # `full_like` varies along the mesh axes that x varies along, as both branches of a conditional have to.
    y_RD = jax.lax.full_like(x_RD, 0)
    mean = -(-R // experts.num_experts)
    for e, weights in enumerate(experts.experts):
        block = partial(_block, x_RD, weights)
        if mean > ROW_BLOCKS[-1]:
            y_RD = over_blocks(starts_e[e], group_sizes_e[e], R, ROW_BLOCKS, block, y_RD)
        else:
            y_RD = _in_one_block(block, starts_e[e], group_sizes_e[e], row_counts(R, experts.num_experts), y_RD)
    return y_RD


def row_counts(rows: int, experts: int) -> tuple[int, ...]:
    """Return the numbers of rows for which a product is compiled: half, once and twice the mean of an expert, and all rows.

    Args:
        rows: number of rows of all experts.
        experts: number of experts.
    """
    mean = 1
    while mean * experts < rows:
        mean *= 2
    counts = {max(mean // 2, 1), mean, 2 * mean}
    return (*sorted(count for count in counts if count < rows), rows)


def _in_one_block(
    block: partial[Float[Array, "R D"]],
    start: Int[Array, ""],
    size: Int[Array, ""],
    counts: tuple[int, ...],
    y_RD: Float[Array, "R D"],
) -> Float[Array, "R D"]:
    """Apply an expert to its rows in a block of the smallest of some numbers of rows; without rows it is not read."""
    R = y_RD.shape[0]

    def rows(count: int, y_RD: Float[Array, "R D"]) -> Float[Array, "R D"]:
        begin = jnp.minimum(start, R - count)
        row = begin + jnp.arange(count)[:, None]
        return block(count, begin, (row >= start) & (row < start + size), y_RD)

    def without_rows(y_RD: Float[Array, "R D"]) -> Float[Array, "R D"]:
        return y_RD

    branches: list[Callable[..., Float[Array, "R D"]]] = [without_rows]
    for count in counts:
        branches.append(partial(rows, count))
    larger = sum((size > count).astype(jnp.int32) for count in counts[:-1])
    return jax.lax.switch(jnp.where(size > 0, 1 + larger, 0), branches, y_RD)


def _block(
    x_RD: Float[Array, "R D"],
    expert: ExpertWeights,
    rows: int,
    start: Int[Array, ""],
    is_own: Bool[Array, "rows 1"] | None,
    y_RD: Float[Array, "R D"],
) -> Float[Array, "R D"]:
    """Write the outputs of an expert for `rows` rows from `start` into y; rows that are not its own keep what is there."""
    x = jax.lax.dynamic_slice_in_dim(x_RD, start, rows)
    y = _product(jax.nn.silu(_product(x, expert.gate)) * _product(x, expert.up), expert.down)
    if is_own is not None:
        y = jnp.where(is_own, y, jax.lax.dynamic_slice_in_dim(y_RD, start, rows))
    return jax.lax.dynamic_update_slice_in_dim(y_RD, y, start, 0)


def _product(x: Float[Array, "r I"], matrix: ExpertMatrix) -> Float[Array, "r O"]:
    """Multiply rows by the matrix of an expert, and add the LoRA delta if there is one."""
    assert not isinstance(matrix.weight, Quantized | InStack)
    y = x @ matrix.weight.astype(x.dtype)
    if matrix.lora_a is not None and matrix.lora_b is not None:
        y += (x @ matrix.lora_a.astype(x.dtype)) @ matrix.lora_b.astype(x.dtype)
    return y
