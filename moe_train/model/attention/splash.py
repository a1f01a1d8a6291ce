"""Attention on TPUs: JAX's Pallas splash attention with segment ids, windows and sequences split over `context`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from moe_train.machine.mesh import axis_size, platform
from moe_train.model.attention.blocked import SegmentIds
from moe_train.model.attention.context_parallel import run_len, run_starts


def block_size(T: int) -> int:
    """Return the block size, in queries and in keys, for sequences of T tokens; it divides the run of queries."""
    return next(block for block in (512, 256, 128) if run_len(T) % block == 0)


def _heads_first(x_BTNH: Float[Array, "B T N H"], K: int) -> Float[Array, "B K G T H"]:
    """Transpose (B, T, N, H) to (B, K, G, T, H): query heads are grouped by key head and each head's sequence is contiguous."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def make_splash(T: int, group: int, window: int | None, is_causal: bool = True) -> Any:
    """Create the kernel and its tables of the blocks that are not fully masked. Global view.

    The tables are split over `context` in the same order as the queries after `to_zigzag`.

    Args:
        T: length of the full sequence.
        group: number of query heads per key head.
        window: sliding window in tokens; None for full causal attention.
        is_causal: whether a query sees only keys that are not later than itself; if not, queries keep their order, and see
            their whole segment.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mask: Any = masks.FullMask((T, T))
    if is_causal:
        # LocalMask counts the keys before a query without the query's own, which makes window - 1.
        mask = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
        # The kernel is told the true positions of the zig-zag reordered queries, so that it masks and skips the right blocks.
        run = run_len(T)
        starts = itertools.chain.from_iterable(run_starts(T))
        mask.q_sequence = np.concatenate([np.arange(start, start + run, dtype=np.int32) for start in starts])
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block_size(T) for name in names}
    # A kernel for one key head and its group of queries; `splash_attention` maps it over the key heads of a device.
    splash = kernel.make_splash_mqa(
        masks.MultiHeadMask([mask] * group),
        block_sizes=kernel.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=axis_size("context"),
        residual_checkpoint_name="attention",
        # Tests run the TPU kernel on CPUs, where Pallas can only interpret it.
        interpret=platform() == "cpu",
    )
    return jax.tree.map(jax.sharding.reshard, splash, table_specs(splash))


def table_specs(splash: Any) -> Any:
    """Return the partition specs of the tables of a kernel."""
    # `manual_sharding_spec` asks for shard shapes, which JAX cannot give on a mesh with a manual axis.
    # So the specs are taken from a mesh of `context` only.
    context_only = AbstractMesh((axis_size("context"),), ("context",), axis_types=(AxisType.Explicit,))
    return splash.manual_sharding_spec(NamedSharding(context_only, P(None, "context")))


def splash_attention(
    splash: Callable[..., Any],
    q_BtNH: Float[Array, "B t N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKW: Float[Array, "B T K W"],
    segment_ids: SegmentIds,
) -> Float[Array, "B t N W"]:
    """Compute attention with the kernel. Local view.

    Args:
        splash: result of `make_splash`: this device's part of its tables.
        q_BtNH: this device's queries, reordered by `to_zigzag`.
        k_BTKH: keys of the full sequence.
        v_BTKW: values of the full sequence.
        segment_ids: segment ids of the queries, in their order, and of the keys.

    Returns:
        The attention output, in the order of the queries.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    B, t, N, H = q_BtNH.shape
    K = k_BTKH.shape[2]
    # The kernel itself does not scale the scores.
    q = _heads_first(q_BtNH, K) * jnp.asarray(1 / math.sqrt(H), q_BtNH.dtype)
    k = k_BTKH.transpose(0, 2, 1, 3)
    v = v_BTKW.transpose(0, 2, 1, 3)
    of_group = jax.vmap(splash, in_axes=(0, 0, 0, None))  # over the key heads of a sequence
    y = jax.vmap(of_group)(q, k, v, kernel.SegmentIds(segment_ids.queries_Bt, segment_ids.keys_BT))
    return y.transpose(0, 3, 1, 2, 4).reshape(B, t, N, v_BTKW.shape[-1])
