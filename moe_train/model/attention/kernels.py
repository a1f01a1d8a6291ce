"""Selection of the attention kernel, and the reference implementation that every kernel is tested against."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from moe_train.machine.mesh import batch_axes, platform
from moe_train.model.attention.blocked import NEG, PositionMask, SegmentIds, SharedPrompts, blocked_attention
from moe_train.model.attention.context_parallel import from_zigzag, run_len, run_starts, to_zigzag
from moe_train.model.attention.places import TokenPlaces
from moe_train.model.attention.splash import make_splash, splash_attention, table_specs
from moe_train.model.sharding.collectives import gather_axis


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKW: Float[Array, "B S K W"],
    places: TokenPlaces,
    window: int | None = None,
    kernel: str = "auto",
) -> Float[Array, "B T N W"]:
    """Compute causal self-attention of packed sequences.

    Args:
        q_BTNH: queries with N heads; scores are divided by the square root of H.
        k_BSKH: keys with K heads; N is a multiple of K. S is T, or more if each device of `context` already has the whole
            sequence (`gather_sequence`).
        v_BSKW: values, which may have another width than queries and keys.
        places: positions, segments and prompts. Not every kernel takes prompts (`takes_shared_prompts`).
        window: a query sees only keys less than `window` positions before it; None for no limit.
        kernel: as in `config.Compute.attention`.

    Returns:
        The attention output (B, T, N, W).
    """
    kernel = choose_attention_kernel(kernel, q_BTNH.shape[1], q_BTNH.dtype)
    # The kernel's tables are an argument of the `shard_map`, which splits them over `context` like the queries.
    splash = None
    if kernel == "splash":
        assert places.prompt_ids_BT is None
        splash = make_splash(q_BTNH.shape[1], q_BTNH.shape[2] // k_BSKH.shape[2], window)
    is_gathered = k_BSKH.shape[1] > q_BTNH.shape[1]

    def local(
        q: Float[Array, "b t n H"],
        k: Float[Array, "b s k H"],
        v: Float[Array, "b s k W"],
        places: TokenPlaces,
        splash: Any,
    ) -> Float[Array, "b t n W"]:
        positions, segments, prompts = places
        if not is_gathered:
            k, v = (gather_axis(x, "context", 1) for x in (k, v))
        positions_k, segments_k = (gather_axis(x, "context", 1) for x in (positions, segments))
        match kernel:
            case "reference":
                return reference_attention(q, k, v, attention_mask(positions, positions_k, segments, segments_k, window, prompts))
            case "cudnn":
                return cudnn_attention(q, k, v, attention_mask(positions, positions_k, segments, segments_k, window, prompts))
            # The two kernels below skip masked blocks, so they need zig-zag order for equal work; those above take the full mask.
            case "blocked":
                q = to_zigzag(q)
                segments = to_zigzag(segments)
                device = jax.lax.axis_index("context")
                mask = PositionMask(run_starts(k.shape[1]), window)
                shared = None
                if prompts is not None:
                    shared = SharedPrompts(to_zigzag(prompts), to_zigzag(positions), positions_k)
                return from_zigzag(blocked_attention(q, k, v, SegmentIds(segments, segments_k, shared), device, mask))
            case "splash":
                q = to_zigzag(q)
                segments = to_zigzag(segments)
                return from_zigzag(splash_attention(splash, q, k, v, SegmentIds(segments, segments_k)))
        raise AssertionError(kernel)

    heads = P(batch_axes(), "context", "tensor", None)
    tokens = P(batch_axes(), "context")
    # A Pallas call does not declare along which mesh axes its result varies, so the check is on only for the kernels in plain XLA.
    # Everything that crosses devices here is all-gathered or permuted along `context`, along which everything is split.
    check_vma = kernel in ("reference", "blocked")
    in_specs = (heads, heads, heads, tokens, None if splash is None else table_specs(splash))
    run = jax.shard_map(local, in_specs=in_specs, out_specs=heads, check_vma=check_vma)
    return run(q_BTNH, k_BSKH, v_BSKW, places, splash)


def cudnn_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKW: Float[Array, "B S K W"],
    visible_BTS: Bool[Array, "B T S"],
) -> Float[Array, "B T N W"]:
    """Compute attention with cuDNN, which needs queries, keys and values of one width. Local view."""
    H = q_BTNH.shape[-1]
    W = v_BSKW.shape[-1]
    # Dims of zeros change neither a score nor the other dims of the output; they are cut off afterwards.
    q, k, v = (_padded_to(x, max(H, W)) for x in (q_BTNH, k_BSKH, v_BSKW))
    scale = 1 / math.sqrt(H)
    y = jax.nn.dot_product_attention(q, k, v, mask=visible_BTS[:, None], scale=scale, implementation="cudnn")
    return y[..., :W]


def _padded_to(x: Float[Array, "*dims"], width: int) -> Float[Array, "..."]:
    """Append zeros to the last dim."""
    missing = width - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def choose_attention_kernel(kernel: str, seq_len: int, dtype: jnp.dtype) -> str:
    """Resolve `auto` to the fast kernel of the mesh's platform, and return other names unchanged.

    `auto` gives `blocked` on CPU, and wherever the fast kernel cannot take these sequences: splash needs runs of queries in
    multiples of 128, cuDNN needs a 16-bit dtype.
    """
    if kernel != "auto":
        return kernel
    match platform():
        case "tpu" if run_len(seq_len) % 128 == 0:
            return "splash"
        case "gpu" | "cuda" if jnp.dtype(dtype).itemsize == 2:
            return "cudnn"
    return "blocked"


def takes_shared_prompts(kernel: str) -> bool:
    """Return whether a kernel lets several segments continue one prompt; splash compares segment ids for equality alone."""
    return kernel != "splash"


def attention_mask(
    positions_q: Int[Array, "B T"],
    positions_k: Int[Array, "B S"],
    segments_q: Int[Array, "B T"] | None,
    segments_k: Int[Array, "B S"] | None,
    window: int | None,
    prompts_q: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B T S"]:
    """Return the (B, T, S) mask that is True where the query sees the key.

    Args:
        positions_q: positions of the queries.
        positions_k: positions of the keys.
        segments_q: segment ids of the queries; None to ignore segments.
        segments_k: segment ids of the keys; None to ignore segments.
        window: a query sees only keys less than `window` positions before it; None for no limit.
        prompts_q: ids of the segments that the queries' segments continue; None if they continue none.
    """
    distance = positions_q[:, :, None] - positions_k[:, None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if segments_q is not None and segments_k is not None:
        in_segment = segments_q[:, :, None] == segments_k[:, None, :]
        if prompts_q is not None:
            in_segment |= prompts_q[:, :, None] == segments_k[:, None, :]
        visible &= in_segment
    return visible


def reference_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKW: Float[Array, "B S K W"],
    visible_BTS: Bool[Array, "B T S"],
) -> Float[Array, "B T N W"]:
    """Compute softmax(q·k / sqrt(H)) v with the full (T, S) matrix in memory and float32 scores."""
    weights = jax.nn.softmax(attention_scores(q_BTNH, k_BSKH, visible_BTS), axis=-1).astype(v_BSKW.dtype)
    y_BTKGW = jnp.einsum("BKGTS,BSKW->BTKGW", weights, v_BSKW)
    return y_BTKGW.reshape(*q_BTNH.shape[:-1], v_BSKW.shape[-1])


def attention_scores(
    q_BTNH: Float[Array, "B T N H"], k_BSKH: Float[Array, "B S K H"], visible_BTS: Bool[Array, "B T S"]
) -> Float[Array, "B K G T S"]:
    """Return q·k / sqrt(H) in float32, (B, K, G, T, S) with G = N / K, and NEG where a key is not visible."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) / math.sqrt(H)
    return jnp.where(visible_BTS[:, None, None], scores, NEG)
