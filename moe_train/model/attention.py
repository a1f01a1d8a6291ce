"""Grouped-query attention: the layer, and one function `attend` with a plain reference and a fast path per platform.

A query sees a key of the same segment whose position is not later than its own and, where a window W is set,
less than W behind it. Local view: the kernels run inside `shard_map`, each device on its own sequences and heads.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_train import config
from moe_train.mesh import BATCH, platform
from moe_train.model import rope
from moe_train.model.fsdp import split
from moe_train.model.layers import Linear, keys_of

NEG = -1e30
"""Score of a masked pair: finite, so that a row without any key stays finite."""


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
            at = jnp.where(positions < 0, slots.shape[1], positions)  # a negative index would count from the end
            return slots.at[jnp.arange(slots.shape[0])[:, None], at].set(new.astype(slots.dtype), mode="drop")

        spec = P(BATCH, "context", "tensor", None)
        return jax.shard_map(local, in_specs=(spec, spec, P(BATCH, "context")), out_specs=spec)(slots, new, positions_BT)

    return Cache(write(cache.k_BSKH, k_BTKH), write(cache.v_BSKH, v_BTKH))


def _attend_cache(q_BTNH: jax.Array, cache: Cache, positions_BT: jax.Array, window: int | None) -> jax.Array:
    def local(q: jax.Array, k: jax.Array, v: jax.Array, positions_q: jax.Array) -> jax.Array:
        slots = jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2])
        return reference(q, k, v, visible(positions_q, slots, None, None, window))

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

    def local(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        match kernel:
            case "reference":
                return reference(q, k, v, visible(positions, positions, segments, segments, window))
            case "blocked":
                return blocked(q, k, v, segments, window)
            case "splash":
                return _splash(q, k, v, segments, window)
            case "cudnn":
                seen = visible(positions, positions, segments, segments, window)
                return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], implementation="cudnn")
        raise AssertionError(kernel)

    heads, tokens = P(BATCH, "context", "tensor", None), P(BATCH, "context")
    # A Pallas call does not say along which axes its result varies, so the check is off on that path alone;
    # nothing crosses devices in here.
    check_vma = kernel in ("reference", "blocked")
    run = jax.shard_map(local, in_specs=(heads, heads, heads, tokens, tokens), out_specs=heads, check_vma=check_vma)
    return run(q_BTNH, k_BTKH, v_BTKH, positions_BT, segment_ids_BT)


def choose_kernel(kernel: str, seq_len: int, dtype: jnp.dtype) -> str:
    """`auto` -> the fast path of the platform that the mesh is made of, or `blocked` where that path cannot take these
    sequences: splash wants multiples of 128, cuDNN 16-bit numbers."""
    if kernel != "auto":
        return kernel
    match platform():
        case "tpu" if seq_len % 128 == 0:
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
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) / math.sqrt(H)
    scores = jnp.where(visible_BTS[:, None, None], scores, NEG)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(B, T, N, H)


# --- CPU: blocks of queries against the keys before them ---------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def blocked(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, window: int | None) -> jax.Array:
    """Attention one sequence and one block of queries at a time; the masked half is never computed.

    The backward pass recomputes the weights from the saved log-sum-exp (FlashAttention-2, arXiv:2307.08691).
    """
    return _blocked_forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, window)[0]


def _spans(T: int, window: int | None) -> list[tuple[int, int, int]]:
    """(first query, end of queries, first key) of each block; at most 16 blocks, so that compiling stays quick."""
    block = max(128, -(-T // 16))
    return [(t, min(t + block, T), 0 if window is None else max(0, t - window + 1)) for t in range(0, T, block)]


def _mask(segments_T: jax.Array, start: int, end: int, first: int, window: int | None) -> jax.Array:
    t, s = jnp.arange(start, end)[:, None], jnp.arange(first, end)[None, :]
    seen = (t >= s) & (segments_T[start:end, None] == segments_T[None, first:end])
    return seen if window is None else seen & (t - s < window)


def _heads_first(x_BTNH: jax.Array, K: int) -> jax.Array:
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _blocked_forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, window):
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q = _heads_first(q_BTNH, K) * jnp.asarray(1 / math.sqrt(H), q_BTNH.dtype)
    k, v = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)

    def sequence(args):
        q_KGTH, k_KTH, v_KTH, segments_T = args
        ys, lses = [], []
        for start, end, first in _spans(T, window):
            seen = _mask(segments_T, start, end, first, window)
            scores = jnp.einsum("KGTH,KSH->KGTS", q_KGTH[:, :, start:end], k_KTH[:, first:end], preferred_element_type=jnp.float32)
            scores = jnp.where(seen, scores, NEG)
            top = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            y = jnp.einsum("KGTS,KSH->KGTH", weights.astype(v_KTH.dtype), v_KTH[:, first:end], preferred_element_type=jnp.float32)
            ys.append((y / total).astype(q_KGTH.dtype))
            lses.append(top + jnp.log(total))
        return jnp.concatenate(ys, axis=2), jnp.concatenate(lses, axis=2)

    y, lse = jax.lax.map(sequence, (q, k, v, segments_BT))
    lse = checkpoint_name(lse, "attention")
    y_BTNH = checkpoint_name(y.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H), "attention")
    return y_BTNH, (q_BTNH, k_BTKH, v_BTKH, segments_BT, y_BTNH, lse)


def _blocked_backward(window, saved, dy_BTNH):
    q_BTNH, k_BTKH, v_BTKH, segments_BT, y_BTNH, lse = saved
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    scale = jnp.asarray(1 / math.sqrt(H), q_BTNH.dtype)
    q, dy = _heads_first(q_BTNH, K) * scale, _heads_first(dy_BTNH, K)
    k, v = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    # rowsum(dy * y): the part of the softmax's gradient that is common to a row
    common = jnp.sum(dy.astype(jnp.float32) * _heads_first(y_BTNH, K).astype(jnp.float32), axis=-1, keepdims=True)

    def sequence(args):
        q_KGTH, k_KTH, v_KTH, segments_T, dy_KGTH, lse_KGT1, common_KGT1 = args
        dk = jnp.zeros_like(k_KTH, jnp.float32)
        dv = jnp.zeros_like(v_KTH, jnp.float32)
        dqs = []
        for start, end, first in _spans(T, window):
            seen = _mask(segments_T, start, end, first, window)
            q_b, dy_b = q_KGTH[:, :, start:end], dy_KGTH[:, :, start:end]
            k_b, v_b = k_KTH[:, first:end], v_KTH[:, first:end]
            scores = jnp.einsum("KGTH,KSH->KGTS", q_b, k_b, preferred_element_type=jnp.float32)
            weights = jnp.where(seen, jnp.exp(scores - lse_KGT1[:, :, start:end]), 0)
            dweights = jnp.einsum("KGTH,KSH->KGTS", dy_b, v_b, preferred_element_type=jnp.float32)
            dscores = (weights * (dweights - common_KGT1[:, :, start:end])).astype(k_b.dtype)
            dqs.append(jnp.einsum("KGTS,KSH->KGTH", dscores, k_b))
            # f32 += f32: keys are seen by many blocks
            dk = dk.at[:, first:end].add(jnp.einsum("KGTS,KGTH->KSH", dscores, q_b, preferred_element_type=jnp.float32))
            weights = weights.astype(dy_b.dtype)
            dv = dv.at[:, first:end].add(jnp.einsum("KGTS,KGTH->KSH", weights, dy_b, preferred_element_type=jnp.float32))
        return jnp.concatenate(dqs, axis=2) * scale, dk.astype(k_KTH.dtype), dv.astype(v_KTH.dtype)

    dq, dk, dv = jax.lax.map(sequence, (q, k, v, segments_BT, dy, lse, common))
    return dq.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H), dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3), None


blocked.defvjp(_blocked_forward, _blocked_backward)


# --- TPU: splash attention ---------------------------------------------------------------------------------------


def _splash(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, window: int | None) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    mask = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    side = next(b for b in (512, 256, 128) if T % b == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": side for name in names}
    run = kernel.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * (N // K)),
        block_sizes=kernel.BlockSizes(**blocks),
        residual_checkpoint_name="attention",
        interpret=platform() == "cpu",
    )
    q = _heads_first(q_BTNH, K) * jnp.asarray(1 / math.sqrt(H), q_BTNH.dtype)
    k, v = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    of_group = jax.vmap(run, in_axes=(0, 0, 0, None))  # over kv heads
    y = jax.vmap(of_group)(q, k, v, kernel.SegmentIds(segments_BT, segments_BT))
    return y.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
