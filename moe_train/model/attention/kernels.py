"""Selection of the attention kernel, and the reference implementation that every kernel is tested against."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_train.machine.mesh import batch_axes, platform
from moe_train.model.attention.blocked import NEG, blocked
from moe_train.model.attention.context_parallel import balanced, in_order, parts, run_len
from moe_train.model.attention.splash import make_splash, spec_of, splash_attention
from moe_train.model.sharding.collectives import gather


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    positions_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    window: int | None = None,
    kernel: str = "auto",
) -> Float[Array, "B T N H"]:
    """Compute causal self-attention of packed sequences.

    Args:
        q_BTNH: queries with N heads.
        k_BTKH: keys with K heads; N is a multiple of K.
        v_BTKH: values.
        positions_BT: positions, which restart in each segment.
        segment_ids_BT: a query sees only keys with its own segment id.
        window: a query sees only keys less than `window` positions before it; None for no limit.
        kernel: as in `config.Compute.attention`.

    Returns:
        The attention output (B, T, N, H).
    """
    kernel = choose_kernel(kernel, q_BTNH.shape[1], q_BTNH.dtype)
    splash = make_splash(q_BTNH.shape[1], q_BTNH.shape[2] // k_BTKH.shape[2], window) if kernel == "splash" else None

    def local(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, segments: jax.Array, splash: Any) -> jax.Array:
        k, v, positions_k, segments_k = (gather(x, "context", 1) for x in (k, v, positions, segments))
        match kernel:
            case "reference":
                return reference(q, k, v, visible(positions, positions_k, segments, segments_k, window))
            case "cudnn":
                seen = visible(positions, positions_k, segments, segments_k, window)
                return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], implementation="cudnn")
            case "blocked":
                q, segments = balanced(q), balanced(segments)
                part = jax.lax.axis_index("context")
                return in_order(blocked(q, k, v, segments, segments_k, part, parts(k.shape[1]), window))
            case "splash":
                q, segments = balanced(q), balanced(segments)
                return in_order(splash_attention(splash, q, k, v, segments, segments_k))
        raise AssertionError(kernel)

    heads, tokens = P(batch_axes(), "context", "tensor", None), P(batch_axes(), "context")
    # A Pallas call does not declare along which mesh axes its result varies, so the check is on only for the kernels in plain XLA.
    # Everything that crosses devices here is all-gathered or permuted along `context`, along which everything is split.
    check_vma = kernel in ("reference", "blocked")
    in_specs = (heads, heads, heads, tokens, tokens, None if splash is None else spec_of(splash))
    run = jax.shard_map(local, in_specs=in_specs, out_specs=heads, check_vma=check_vma)
    return run(q_BTNH, k_BTKH, v_BTKH, positions_BT, segment_ids_BT, splash)


def choose_kernel(kernel: str, seq_len: int, dtype: jnp.dtype) -> str:
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


def visible(
    positions_q: Int[Array, "B T"],
    positions_k: Int[Array, "B S"],
    segments_q: Int[Array, "B T"] | None,
    segments_k: Int[Array, "B S"] | None,
    window: int | None,
) -> Array:
    """Return the (B, T, S) mask that is True where the query sees the key.

    Args:
        positions_q: positions of the queries.
        positions_k: positions of the keys.
        segments_q: segment ids of the queries; None to ignore segments.
        segments_k: segment ids of the keys; None to ignore segments.
        window: a query sees only keys less than `window` positions before it; None for no limit.
    """
    behind = positions_q[:, :, None] - positions_k[:, None, :]
    seen = behind >= 0
    if window is not None:
        seen &= behind < window
    if segments_q is not None and segments_k is not None:
        seen &= segments_q[:, :, None] == segments_k[:, None, :]
    return seen


def reference(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Compute softmax(q·k / sqrt(H)) v with the full (T, S) matrix in memory and float32 scores."""
    weights = jax.nn.softmax(attention_scores(q_BTNH, k_BSKH, visible_BTS), axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(q_BTNH.shape)


def attention_scores(q_BTNH: jax.Array, k_BSKH: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Return q·k / sqrt(H) in float32, (B, K, G, T, S) with G = N / K, and NEG where a key is not visible."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) / math.sqrt(H)
    return jnp.where(visible_BTS[:, None, None], scores, NEG)
