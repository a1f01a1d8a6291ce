"""Cross-entropy chunk by chunk, and the routers' losses.

The (tokens, V) float32 logits of a batch are its largest array by far. Here they exist for one chunk of tokens at
a time, and never in the backward pass: the gradient of a chunk is formed where its logits are.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from moe_train.machine.mesh import batch_axes, global_axes
from moe_train.model.sharding.fsdp import whole_rows
from moe_train.model.sharding.specs import over_replicas, spec_of

CHUNK_ELEMENTS = 2**23
"""Logits of one chunk (32 MiB in float32)."""


def cross_entropy_sum(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    loss_mask_BT: Bool[Array, "B T"],
    beside: tuple[Float[Array, "B T J"], Float[Array, "V J"]] | None = None,
) -> Float[Array, ""]:
    """Sum of -log softmax(hidden · head)[target] over the tokens of the mask; the head may be split on D and V.

    beside: two factors whose product an adapter adds to the logits.
    """
    tokens, axes = P(batch_axes(), "context"), global_axes()
    xs, heads = zip(*((hidden_BTD, head_VD), *([] if beside is None else [beside])), strict=True)
    specs = tuple(spec_of(head) for head in heads)

    def local(xs: tuple[jax.Array, ...], heads: tuple[jax.Array, ...], targets_bt: jax.Array, mask_bt: jax.Array) -> jax.Array:
        heads = tuple(whole_rows(head.astype(xs[0].dtype), spec, axes) for head, spec in zip(heads, specs, strict=True))
        xs = tuple(jax.lax.pcast(x.reshape(-1, x.shape[-1]), "tensor", to="varying") for x in xs)
        total = _chunked(xs, heads, targets_bt.reshape(-1), mask_bt.reshape(-1))
        return jax.lax.psum(total, axes)

    run = jax.shard_map(local, in_specs=(tokens, specs, tokens, tokens), out_specs=P())
    return over_replicas(run(xs, heads, targets_BT, loss_mask_BT))


@jax.custom_vjp
def _chunked(xs: tuple[jax.Array, ...], heads: tuple[jax.Array, ...], targets_m: jax.Array, mask_m: jax.Array) -> jax.Array:
    """This device's part of the sum, of logits that are sum_i xs_mD[i] · heads_vD[i]; its parts over `tensor` sum to the
    loss of its tokens."""
    return _chunked_forward(xs, heads, targets_m, mask_m)[0]


def _chunked_forward(xs, heads, targets_m, mask_m):
    m, v = xs[0].shape[0], heads[0].shape[0]
    rows = min(m, max(128, CHUNK_ELEMENTS // v))
    pad = -m % rows
    chunked = lambda x: jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, rows, *x.shape[1:])  # noqa: E731
    first = jax.lax.axis_index("tensor") * v

    def chunk(carry, part):
        total, dheads = carry
        xs_r, targets_r, mask_r = part
        products = (jnp.einsum("rD,vD->rv", x, w, preferred_element_type=jnp.float32) for x, w in zip(xs_r, heads, strict=True))
        logits_rv = functools.reduce(jnp.add, products)
        # a constant for each row, so it needs no gradient; the largest over all parts of V
        top_r1 = jax.lax.pmax(jnp.max(logits_rv, axis=-1, keepdims=True), "tensor")
        exps_rv = jnp.exp(logits_rv - top_r1)
        sums_r1 = jax.lax.psum(jnp.sum(exps_rv, axis=-1, keepdims=True), "tensor")
        hit_rv = (targets_r - first)[:, None] == jnp.arange(v)
        target_logit_r = jnp.sum(jnp.where(hit_rv, logits_rv, 0), axis=-1)
        # every part of V counts its own target logits; part 0 alone counts the normaliser
        normaliser_r = jnp.where(first == 0, (top_r1 + jnp.log(sums_r1))[:, 0], 0)
        total += jnp.sum(jnp.where(mask_r, normaliser_r - target_logit_r, 0))
        dlogits_rv = jnp.where(mask_r[:, None], exps_rv / sums_r1 - hit_rv, 0).astype(xs_r[0].dtype)
        dxs = tuple(jnp.einsum("rv,vD->rD", dlogits_rv, w) for w in heads)
        dheads = tuple(
            dw + jnp.einsum("rv,rD->vD", dlogits_rv, x, preferred_element_type=jnp.float32)
            for dw, x in zip(dheads, xs_r, strict=True)
        )
        return (total, dheads), dxs

    zeros = functools.partial(jax.lax.full_like, xs[0], 0, jnp.float32)
    start = (zeros(()), tuple(zeros(w.shape) for w in heads))
    parts = tuple(chunked(x) for x in xs), chunked(targets_m), chunked(mask_m)
    (total, dheads), dxs = jax.lax.scan(chunk, start, parts)
    dxs = tuple(dx.reshape(-1, dx.shape[-1])[:m] for dx in dxs)
    return total, (dxs, tuple(dw.astype(w.dtype) for dw, w in zip(dheads, heads, strict=True)))


def _chunked_backward(saved, dtotal):
    # the scale in float32: rounded to bfloat16 it would bias every gradient by the same factor
    dxs, dheads = jax.tree.map(lambda x: (x * dtotal).astype(x.dtype), saved)
    return dxs, dheads, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)
