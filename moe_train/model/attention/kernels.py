"""Which kernel computes attention, and the reference that all of them are held to."""

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
    """Causal self-attention of packed sequences; `kernel` as in `config.Compute.attention`."""
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
    # A Pallas call does not say along which axes its result varies, so the check is off on that path alone;
    # what crosses devices in here is gathered or changes places along `context`, along which everything is split.
    check_vma = kernel in ("reference", "blocked")
    in_specs = (heads, heads, heads, tokens, tokens, None if splash is None else spec_of(splash))
    run = jax.shard_map(local, in_specs=in_specs, out_specs=heads, check_vma=check_vma)
    return run(q_BTNH, k_BTKH, v_BTKH, positions_BT, segment_ids_BT, splash)


def choose_kernel(kernel: str, seq_len: int, dtype: jnp.dtype) -> str:
    """`auto` -> the fast path of the platform that the mesh is made of, or `blocked` where that path cannot take these
    sequences: splash wants runs of queries in multiples of 128, cuDNN 16-bit numbers."""
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
    """(B, T, S) mask: True where the query sees the key."""
    behind = positions_q[:, :, None] - positions_k[:, None, :]
    seen = behind >= 0
    if window is not None:
        seen &= behind < window
    if segments_q is not None and segments_k is not None:
        seen &= segments_q[:, :, None] == segments_k[:, None, :]
    return seen


def reference(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """softmax(q·k / sqrt(H)) v with the whole (T, S) matrix in memory; scores in float32."""
    weights = jax.nn.softmax(attention_scores(q_BTNH, k_BSKH, visible_BTS), axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(q_BTNH.shape)


def attention_scores(q_BTNH: jax.Array, k_BSKH: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """q·k / sqrt(H) in float32, (B, K, G, T, S), with NEG where a key is not visible."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) / math.sqrt(H)
    return jnp.where(visible_BTS[:, None, None], scores, NEG)
