"""Grouped-query attention: the layer, and one function `attend` with a plain reference and a fast path per platform.

A query sees a key of the same segment whose position is not later than its own and, where a window W is set,
less than W behind it. Local view: the kernels run inside `shard_map`, each device on its own sequences and heads.

Along the mesh axis `context` a device has the queries of its part of the sequence; keys and values, which are few, are
gathered. The last queries see the most keys, so queries change places with the other end of the sequence first: of
2c chunks device i attends for chunk i and chunk 2c - 1 - i, which is as much work on every device.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_train import config
from moe_train.mesh import BATCH, axis_size, batch_axes, platform
from moe_train.model import rope
from moe_train.model.fsdp import gather, split
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
        return jax.lax.psum_scatter(y, "context", scatter_dimension=1, tiled=True).reshape(part).astype(q.dtype)

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
    splash = _make_splash(q_BTNH.shape[1], q_BTNH.shape[2] // k_BTKH.shape[2], window) if kernel == "splash" else None

    def local(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, segments: jax.Array, splash: Any) -> jax.Array:
        k, v, positions_k, segments_k = (gather(x, "context", 1) for x in (k, v, positions, segments))
        match kernel:
            case "reference":
                return reference(q, k, v, visible(positions, positions_k, segments, segments_k, window))
            case "cudnn":
                seen = visible(positions, positions_k, segments, segments_k, window)
                return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], implementation="cudnn")
            case "blocked":
                q, segments = _balanced(q), _balanced(segments)
                part = jax.lax.axis_index("context")
                return _in_order(blocked(q, k, v, segments, segments_k, part, _parts(k.shape[1]), window))
            case "splash":
                q, segments = _balanced(q), _balanced(segments)
                return _in_order(_splash(splash, q, k, v, segments, segments_k))
        raise AssertionError(kernel)

    heads, tokens = P(batch_axes(), "context", "tensor", None), P(batch_axes(), "context")
    # A Pallas call does not say along which axes its result varies, so the check is off on that path alone;
    # what crosses devices in here is gathered or changes places along `context`, along which everything is split.
    check_vma = kernel in ("reference", "blocked")
    in_specs = (heads, heads, heads, tokens, tokens, None if splash is None else _spec_of_splash(splash))
    run = jax.shard_map(local, in_specs=in_specs, out_specs=heads, check_vma=check_vma)
    return run(q_BTNH, k_BTKH, v_BTKH, positions_BT, segment_ids_BT, splash)


def choose_kernel(kernel: str, seq_len: int, dtype: jnp.dtype) -> str:
    """`auto` -> the fast path of the platform that the mesh is made of, or `blocked` where that path cannot take these
    sequences: splash wants runs of queries in multiples of 128, cuDNN 16-bit numbers."""
    if kernel != "auto":
        return kernel
    match platform():
        case "tpu" if _run(seq_len) % 128 == 0:
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


# --- queries along `context` --------------------------------------------------------------------------------------


def _parts(T: int) -> tuple[tuple[int, ...], ...]:
    """Of each device of `context`: where the equally long runs of queries begin that it attends for."""
    c = axis_size("context")
    return ((0,),) if c == 1 else tuple((i * _run(T), (2 * c - 1 - i) * _run(T)) for i in range(c))


def _run(T: int) -> int:
    """Queries of a run."""
    return T if axis_size("context") == 1 else T // (2 * axis_size("context"))


def _owner(chunk: int) -> int:
    return min(chunk, 2 * axis_size("context") - 1 - chunk)


def _balanced(x_Bt: jax.Array) -> jax.Array:
    """This device's part of the sequence, chunks 2i and 2i + 1 -> chunks i and 2c - 1 - i, one of which is even."""
    c = axis_size("context")
    if c == 1:
        return x_Bt
    even, odd = (
        jax.lax.ppermute(chunk, "context", [(i, _owner(2 * i + j)) for i in range(c)])
        for j, chunk in enumerate(jnp.split(x_Bt, 2, axis=1))
    )
    first_is_even = jax.lax.axis_index("context") % 2 == 0
    return jnp.concatenate([jnp.where(first_is_even, even, odd), jnp.where(first_is_even, odd, even)], axis=1)


def _in_order(x_Bt: jax.Array) -> jax.Array:
    """The way back from `_balanced`."""
    c = axis_size("context")
    if c == 1:
        return x_Bt
    first, last = jnp.split(x_Bt, 2, axis=1)
    first_is_even = jax.lax.axis_index("context") % 2 == 0
    chunks = jnp.where(first_is_even, first, last), jnp.where(first_is_even, last, first)
    return jnp.concatenate(
        [jax.lax.ppermute(chunk, "context", [(_owner(2 * i + j), i) for i in range(c)]) for j, chunk in enumerate(chunks)], axis=1
    )


# --- CPU: blocks of queries against the keys before them ---------------------------------------------------------


Parts = tuple[tuple[int, ...], ...]


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def blocked(
    q_BtNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_Bt: jax.Array,
    segments_BT: jax.Array,
    part: jax.Array,
    parts: Parts,
    window: int | None,
) -> jax.Array:
    """Attention one sequence and one block of queries at a time; the masked half is never computed.

    The queries are runs of the sequence, which begin at parts[part]. The backward pass recomputes the weights from the
    saved log-sum-exp (FlashAttention-2, arXiv:2307.08691).
    """
    return _blocked_forward(q_BtNH, k_BTKH, v_BTKH, segments_Bt, segments_BT, part, parts, window)[0]


class _Span(NamedTuple):
    """A block of queries: rows `start` to `end`, of which the first is at `position`; the first key that it sees."""

    start: int
    end: int
    position: int
    first: int

    @property
    def queries(self) -> slice:
        return slice(self.start, self.end)

    @property
    def keys(self) -> slice:
        return slice(self.first, self.position + self.end - self.start)


def _spans(t: int, T: int, starts: tuple[int, ...], window: int | None) -> list[_Span]:
    """Of T queries about 16 blocks over all devices, so that compiling stays quick."""
    block, run = max(128, -(-T // 16)), t // len(starts)
    spans = []
    for i, position in enumerate(starts):
        for at in range(0, run, block):
            first = 0 if window is None else max(0, position + at - window + 1)
            spans.append(_Span(i * run + at, i * run + min(at + block, run), position + at, first))
    return spans


def _mask(span: _Span, segments_t: jax.Array, segments_T: jax.Array, window: int | None) -> jax.Array:
    t = jnp.arange(span.position, span.keys.stop)[:, None]
    s = jnp.arange(span.first, span.keys.stop)[None, :]
    seen = (t >= s) & (segments_t[span.queries, None] == segments_T[None, span.keys])
    return seen if window is None else seen & (t - s < window)


def _over_sequences(sequence: Any, part: jax.Array, parts: Parts, arrays: tuple[jax.Array, ...]) -> Any:
    """`sequence(starts, arrays of one sequence)`, for each in turn, where `starts` is static: a branch for each part."""
    branches = [lambda arrays, starts=starts: jax.lax.map(partial(sequence, starts), arrays) for starts in parts]
    return branches[0](arrays) if len(parts) == 1 else jax.lax.switch(part, branches, arrays)


def _heads_first(x_BTNH: jax.Array, K: int) -> jax.Array:
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _blocked_forward(q_BtNH, k_BTKH, v_BTKH, segments_Bt, segments_BT, part, parts, window):
    B, t, N, H = q_BtNH.shape
    T, K = k_BTKH.shape[1:3]
    q = _heads_first(q_BtNH, K) * jnp.asarray(1 / math.sqrt(H), q_BtNH.dtype)
    k, v = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)

    def sequence(starts, arrays):
        q_KGtH, k_KTH, v_KTH, segments_t, segments_T = arrays
        ys, lses = [], []
        for span in _spans(t, T, starts, window):
            seen = _mask(span, segments_t, segments_T, window)
            q_b, k_b, v_b = q_KGtH[:, :, span.queries], k_KTH[:, span.keys], v_KTH[:, span.keys]
            scores = jnp.einsum("KGTH,KSH->KGTS", q_b, k_b, preferred_element_type=jnp.float32)
            scores = jnp.where(seen, scores, NEG)
            top = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            y = jnp.einsum("KGTS,KSH->KGTH", weights.astype(v_b.dtype), v_b, preferred_element_type=jnp.float32)
            ys.append((y / total).astype(q_b.dtype))
            lses.append(top + jnp.log(total))
        return jnp.concatenate(ys, axis=2), jnp.concatenate(lses, axis=2)

    y, lse = _over_sequences(sequence, part, parts, (q, k, v, segments_Bt, segments_BT))
    lse = checkpoint_name(lse, "attention")
    y_BtNH = checkpoint_name(y.transpose(0, 3, 1, 2, 4).reshape(B, t, N, H), "attention")
    return y_BtNH, (q_BtNH, k_BTKH, v_BTKH, segments_Bt, segments_BT, part, y_BtNH, lse)


def _blocked_backward(parts, window, saved, dy_BtNH):
    q_BtNH, k_BTKH, v_BTKH, segments_Bt, segments_BT, part, y_BtNH, lse = saved
    B, t, N, H = q_BtNH.shape
    T, K = k_BTKH.shape[1:3]
    scale = jnp.asarray(1 / math.sqrt(H), q_BtNH.dtype)
    q, dy = _heads_first(q_BtNH, K) * scale, _heads_first(dy_BtNH, K)
    k, v = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    # rowsum(dy * y): the part of the softmax's gradient that is common to a row
    common = jnp.sum(dy.astype(jnp.float32) * _heads_first(y_BtNH, K).astype(jnp.float32), axis=-1, keepdims=True)

    def sequence(starts, arrays):
        q_KGtH, k_KTH, v_KTH, segments_t, segments_T, dy_KGtH, lse_KGt1, common_KGt1 = arrays
        dk = jnp.zeros_like(k_KTH, jnp.float32)
        dv = jnp.zeros_like(v_KTH, jnp.float32)
        dqs = []
        for span in _spans(t, T, starts, window):
            seen = _mask(span, segments_t, segments_T, window)
            q_b, dy_b = q_KGtH[:, :, span.queries], dy_KGtH[:, :, span.queries]
            k_b, v_b = k_KTH[:, span.keys], v_KTH[:, span.keys]
            scores = jnp.einsum("KGTH,KSH->KGTS", q_b, k_b, preferred_element_type=jnp.float32)
            weights = jnp.where(seen, jnp.exp(scores - lse_KGt1[:, :, span.queries]), 0)
            dweights = jnp.einsum("KGTH,KSH->KGTS", dy_b, v_b, preferred_element_type=jnp.float32)
            dscores = (weights * (dweights - common_KGt1[:, :, span.queries])).astype(k_b.dtype)
            dqs.append(jnp.einsum("KGTS,KSH->KGTH", dscores, k_b))
            # f32 += f32: keys are seen by many blocks
            dk = dk.at[:, span.keys].add(jnp.einsum("KGTS,KGTH->KSH", dscores, q_b, preferred_element_type=jnp.float32))
            weights = weights.astype(dy_b.dtype)
            dv = dv.at[:, span.keys].add(jnp.einsum("KGTS,KGTH->KSH", weights, dy_b, preferred_element_type=jnp.float32))
        return jnp.concatenate(dqs, axis=2) * scale, dk.astype(k_KTH.dtype), dv.astype(v_KTH.dtype)

    dq, dk, dv = _over_sequences(sequence, part, parts, (q, k, v, segments_Bt, segments_BT, dy, lse, common))
    return dq.transpose(0, 3, 1, 2, 4).reshape(B, t, N, H), dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3), None, None, None


blocked.defvjp(_blocked_forward, _blocked_backward)


# --- TPU: splash attention ---------------------------------------------------------------------------------------


def splash_block(T: int) -> int:
    """Queries, and keys, of a block of sequences of T tokens: whole blocks make up a run of queries."""
    return next(block for block in (512, 256, 128) if _run(T) % block == 0)


def _make_splash(T: int, group: int, window: int | None) -> Any:
    """The kernel for `group` query heads of a key head, and its tables of the blocks that are not masked. Global view:
    the tables are split over `context` as the queries are, after `_balanced`."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mask = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    run, side = _run(T), splash_block(T)
    mask.q_sequence = np.concatenate([np.arange(start, start + run, dtype=np.int32) for part in _parts(T) for start in part])
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": side for name in names}
    splash = kernel.make_splash_mqa(
        masks.MultiHeadMask([mask] * group),
        block_sizes=kernel.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=axis_size("context"),
        residual_checkpoint_name="attention",
        interpret=platform() == "cpu",
    )
    return jax.tree.map(jax.sharding.reshard, splash, _spec_of_splash(splash))


def _spec_of_splash(splash: Any) -> Any:
    # of `context` alone: it asks for shapes of shards, which JAX has not of a mesh of which an axis is manual
    alone = AbstractMesh((axis_size("context"),), ("context",), axis_types=(AxisType.Explicit,))
    return splash.manual_sharding_spec(NamedSharding(alone, P(None, "context")))


def _splash(
    splash: Any, q_BtNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_Bt: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    B, t, N, H = q_BtNH.shape
    K = k_BTKH.shape[2]
    q = _heads_first(q_BtNH, K) * jnp.asarray(1 / math.sqrt(H), q_BtNH.dtype)
    k, v = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    of_group = jax.vmap(splash, in_axes=(0, 0, 0, None))  # over kv heads
    y = jax.vmap(of_group)(q, k, v, kernel.SegmentIds(segments_Bt, segments_BT))
    return y.transpose(0, 3, 1, 2, 4).reshape(B, t, N, H)
