"""Attention without a causal mask: each query sees its whole segment, as the patches of a picture do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_train.machine.mesh import axis_size, batch_axes
from moe_train.model.attention.blocked import PositionMask, SegmentIds, blocked_attention
from moe_train.model.attention.kernels import choose_attention_kernel, cudnn_attention, reference_attention
from moe_train.model.attention.splash import make_splash, splash_attention, table_specs
from moe_train.model.sharding.collectives import gather_axis


def attend_segments(
    q_BTNH: Float[Array, "B T N H"],
    k_BTNH: Float[Array, "B T N H"],
    v_BTNH: Float[Array, "B T N H"],
    segment_ids_BT: Int[Array, "B T"],
    kernel: str = "auto",
) -> Float[Array, "B T N H"]:
    """Compute attention in which each query sees all keys of its segment.

    Each device of `context` computes its own queries; keys and values are all-gathered.

    Args:
        q_BTNH: queries; scores are divided by the square root of H.
        k_BTNH: keys.
        v_BTNH: values.
        segment_ids_BT: a query sees only keys with its own segment id. Kernels skip blocks of other segments, so work is least
            where a segment is contiguous and ids ascend or descend along a row.
        kernel: as in `config.Compute.attention`.
    """
    kernel = choose_attention_kernel(kernel, q_BTNH.shape[1], q_BTNH.dtype)
    # The kernel's tables are an argument of the `shard_map`, which splits them over `context` like the queries.
    splash = make_splash(q_BTNH.shape[1], 1, None, is_causal=False) if kernel == "splash" else None

    def local(
        q: Float[Array, "b t n H"], k: Float[Array, "b t n H"], v: Float[Array, "b t n H"], segments: Int[Array, "b t"], splash: Any
    ) -> Float[Array, "b t n H"]:
        k, v, segments_k = (gather_axis(x, "context", 1) for x in (k, v, segments))
        match kernel:
            case "reference":
                return reference_attention(q, k, v, segments[:, :, None] == segments_k[:, None, :])
            case "cudnn":
                return cudnn_attention(q, k, v, segments[:, :, None] == segments_k[:, None, :])
            case "blocked":
                # Positions play no part, so every device has one run of queries, wherever it says that it starts.
                mask = PositionMask(((0,),) * axis_size("context"), None, is_causal=False)
                return blocked_attention(q, k, v, SegmentIds(segments, segments_k), jax.lax.axis_index("context"), mask)
            case "splash":
                return splash_attention(splash, q, k, v, SegmentIds(segments, segments_k))
        raise AssertionError(kernel)

    heads = P(batch_axes(), "context", "tensor", None)
    in_specs = (heads, heads, heads, P(batch_axes(), "context"), None if splash is None else table_specs(splash))
    # As in `kernels.attend`, a Pallas call does not declare along which mesh axes its result varies.
    check_vma = kernel in ("reference", "blocked")
    run = jax.shard_map(local, in_specs=in_specs, out_specs=heads, check_vma=check_vma)
    return run(q_BTNH, k_BTNH, v_BTNH, segment_ids_BT, splash)


def separated_padding(segment_ids_BT: Int[Array, "B T"], run: int = 128) -> Int[Array, "B T"]:
    """Return segment ids in which padding (0) is split into short segments of its own, so that it costs next to nothing.

    Args:
        segment_ids_BT: segments, numbered from 1 along a row; 0 for padding at its end.
        run: positions of padding that share a segment.
    """
    T = segment_ids_BT.shape[1]
    runs_T = T + 1 + jnp.arange(T, dtype=segment_ids_BT.dtype) // run
    return jnp.where(segment_ids_BT == 0, runs_T, segment_ids_BT)
