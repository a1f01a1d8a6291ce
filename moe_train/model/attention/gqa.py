"""Grouped-query attention: the layer, and one function `attend` with a plain reference and a fast path per platform.

A query sees a key of the same segment whose position is not later than its own and, where a window W is set,
less than W behind it. Local view: the kernels run inside `shard_map`, each device on its own sequences and heads.

Along the mesh axis `context` a device has the queries of its part of the sequence; keys and values, which are few, are
gathered, and queries change places so that all devices have as much to do (`context`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_train import config
from moe_train.mesh import BATCH, batch_axes, platform
from moe_train.model import rope
from moe_train.model.blocked_attention import NEG, blocked
from moe_train.model.collectives import gather, scatter
from moe_train.model.context import balanced, in_order, parts, run_len
from moe_train.model.fsdp import split
from moe_train.model.layers import Linear, keys_of
from moe_train.model.splash_attention import make_splash, spec_of, splash_attention


class Cache(NamedTuple):
    """Keys and values seen so far; slot s holds position s, and slots past `positions` are masked by causality."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


class Attention(nnx.Module):
    """Projections, rotary positions and grouped-query attention of one layer."""

    def __init__(self, rngs: nnx.Rngs, model: config.Model, compute: config.Compute, window: int | None):
        a, D, dtype = model.attention, model.model_dim, jnp.dtype(compute.param_dtype)
        N, K, H = a.num_heads, a.num_kv_heads, a.head_dim
        q, kv = P("fsdp", split(N), None), P("fsdp", split(K), None)
        self.q_proj = Linear(rngs, "BTD,DNH->BTNH", (D, N, H), q, model.init_stddev, dtype)
        self.k_proj = Linear(rngs, "BTD,DKH->BTKH", (D, K, H), kv, model.init_stddev, dtype)
        self.v_proj = Linear(rngs, "BTD,DKH->BTKH", (D, K, H), kv, model.init_stddev, dtype)
        self.o_proj = Linear(rngs, "BTNH,NHD->BTD", (N, H, D), P(split(N), None, "fsdp"), model.init_stddev, dtype)
        self.rope, self.query_scaling, self.window, self.kernel = model.rope, a.query_scaling, window, compute.attention

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        cache: Cache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """With a cache, x continues the sequences in it, and the cache with x's keys and values is returned.

        key: of the adapters' dropout.
        """
        q_key, k_key, v_key, o_key = keys_of(key, 4)
        q_BTNH = rope.rotate(self.q_proj(x_BTD, q_key), positions_BT, self.rope)
        k_BTKH = rope.rotate(self.k_proj(x_BTD, k_key), positions_BT, self.rope)
        v_BTKH = self.v_proj(x_BTD, v_key)
        if self.query_scaling is not None:
            q_BTNH *= _query_scale(self.query_scaling, positions_BT).astype(q_BTNH.dtype)
        if cache is None:
            y_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, positions_BT, segment_ids_BT, self.window, self.kernel)
        else:
            cache = _extend(cache, k_BTKH, v_BTKH, positions_BT)
            y_BTNH = _attend_cache(q_BTNH, cache, positions_BT, self.window)
        return self.o_proj(y_BTNH, o_key), cache


def _query_scale(scaling: config.QueryScaling, positions_BT: jax.Array) -> jax.Array:
    """(B, T, 1, 1) factor on the queries: 1 + beta * log(1 + floor(position / original_max_seq_len))."""
    blocks = jnp.maximum(positions_BT, 0) // scaling.original_max_seq_len  # padding may be at -1
    return (1 + scaling.beta * jnp.log1p(blocks.astype(jnp.float32)))[:, :, None, None]


def _extend(cache: Cache, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array) -> Cache:
    def write(slots: jax.Array, new: jax.Array) -> jax.Array:
        def local(slots: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
            new, positions = gather(new, "context", 1), gather(positions, "context", 1)
            at = positions - _first("context", slots)
            at = jnp.where((at < 0) | (at >= slots.shape[1]), slots.shape[1], at)  # a negative index would count from the end
            return slots.at[jnp.arange(slots.shape[0])[:, None], at].set(new.astype(slots.dtype), mode="drop")

        spec = P(BATCH, "context", "tensor", None)
        return jax.shard_map(local, in_specs=(spec, spec, P(BATCH, "context")), out_specs=spec)(slots, new, positions_BT)

    return Cache(write(cache.k_BSKH, k_BTKH), write(cache.v_BSKH, v_BTKH))


def _first(axis: str, x: jax.Array) -> jax.Array:
    """Inside `shard_map`: the number of this device's first entry of dim 1, which `axis` splits."""
    return jax.lax.axis_index(axis) * x.shape[1]


def _attend_cache(q_BTNH: jax.Array, cache: Cache, positions_BT: jax.Array, window: int | None) -> jax.Array:
    """Every device has a part of the slots; the softmax is over all of them."""

    def local(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
        part = q.shape
        q, positions = gather(q, "context", 1), gather(positions, "context", 1)
        slots = jnp.broadcast_to(_first("context", k) + jnp.arange(k.shape[1]), k.shape[:2])
        scores = _scores(q, k, visible(positions, slots, None, None, window))
        weights = jnp.exp(scores - jax.lax.pmax(jnp.max(scores, axis=-1, keepdims=True), "context"))
        weights /= jax.lax.psum(jnp.sum(weights, axis=-1, keepdims=True), "context")
        y = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return scatter(y, "context", 1).reshape(part).astype(q.dtype)

    spec = P(BATCH, "context", "tensor", None)
    return jax.shard_map(local, in_specs=(spec, spec, spec, P(BATCH, "context")), out_specs=spec)(q_BTNH, *cache, positions_BT)


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
    weights = jax.nn.softmax(_scores(q_BTNH, k_BSKH, visible_BTS), axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(q_BTNH.shape)


def _scores(q_BTNH: jax.Array, k_BSKH: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """(B, K, G, T, S), float32."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) / math.sqrt(H)
    return jnp.where(visible_BTS[:, None, None], scores, NEG)
