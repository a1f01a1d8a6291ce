"""Cross-entropy chunk by chunk, and the routers' losses.

The (tokens, V) float32 logits of a batch are its largest array by far. Here they exist for one chunk of tokens at
a time, and never in the backward pass: the gradient of a chunk is formed where its logits are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from moe_train import config
from moe_train.mesh import BATCH
from moe_train.model.fsdp import gather, spec_of, vary_with_spec
from moe_train.model.moe import RouterStats
from moe_train.model.transformer import Transformer

CHUNK_ELEMENTS = 2**23
"""Logits of one chunk (32 MiB in float32)."""


class LossParts(NamedTuple):
    """Sums and figures of one microbatch."""

    cross_entropy_sum: Array
    loss_tokens: Array
    routers: RouterStats | None


def microbatch_loss(
    model: Transformer, batch: Any, loss_tokens: Array, microbatches: int, coefs: config.Loss
) -> tuple[Array, LossParts]:
    """This microbatch's share of the step's loss.

    batch: the five (B, T) arrays of a `Batch`; loss_tokens: the number of loss-bearing tokens in the whole
    optimizer step. The shares of all microbatches sum to: mean cross-entropy over those tokens + the routers'
    losses, summed over layers, averaged over microbatches.
    """
    hidden_BTD, routers = model(batch.tokens, batch.positions, batch.segment_ids)
    total = cross_entropy_sum(hidden_BTD, model.head_weight(), batch.targets, batch.loss_mask)
    loss = total / jnp.maximum(loss_tokens, 1)
    if routers is not None:
        balance = (coefs.load_balance_loss_coef or 0.0) * jnp.sum(routers.load_balance_loss)
        z = (coefs.router_z_loss_coef or 0.0) * jnp.sum(routers.router_z_loss)
        loss += (balance + z) / microbatches
    return loss, LossParts(total, jnp.sum(batch.loss_mask), routers)


def cross_entropy_sum(
    hidden_BTD: Float[Array, "B T D"], head_VD: Float[Array, "V D"], targets_BT: Int[Array, "B T"], loss_mask_BT: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Sum of -log softmax(hidden · head)[target] over the tokens of the mask; the head may be split on D and V."""
    tokens, spec = P(BATCH, "context"), spec_of(head_VD)

    def local(x_btD: jax.Array, head_vd: jax.Array, targets_bt: jax.Array, mask_bt: jax.Array) -> jax.Array:
        head_vD = gather(vary_with_spec(head_vd.astype(x_btD.dtype), spec), "fsdp", 1)
        x_mD = jax.lax.pcast(x_btD.reshape(-1, x_btD.shape[-1]), "tensor", to="varying")
        total = _chunked(x_mD, head_vD, targets_bt.reshape(-1), mask_bt.reshape(-1))
        return jax.lax.psum(total, (*BATCH, "context", "tensor"))

    run = jax.shard_map(local, in_specs=(tokens, spec, tokens, tokens), out_specs=P())
    return run(hidden_BTD, head_VD, targets_BT, loss_mask_BT)


@jax.custom_vjp
def _chunked(x_mD: jax.Array, head_vD: jax.Array, targets_m: jax.Array, mask_m: jax.Array) -> jax.Array:
    """This device's part of the sum; its parts over `tensor` sum to the loss of its tokens."""
    return _chunked_forward(x_mD, head_vD, targets_m, mask_m)[0]


def _chunked_forward(x_mD, head_vD, targets_m, mask_m):
    m, v = x_mD.shape[0], head_vD.shape[0]
    rows = min(m, max(128, CHUNK_ELEMENTS // v))
    pad = -m % rows
    chunked = lambda x: jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, rows, *x.shape[1:])  # noqa: E731
    first = jax.lax.axis_index("tensor") * v

    def chunk(carry, xs):
        total, dhead_vD = carry
        x_rD, targets_r, mask_r = xs
        logits_rv = jnp.einsum("rD,vD->rv", x_rD, head_vD, preferred_element_type=jnp.float32)
        # a constant for each row, so it needs no gradient; the largest over all parts of V
        top_r1 = jax.lax.pmax(jnp.max(logits_rv, axis=-1, keepdims=True), "tensor")
        exps_rv = jnp.exp(logits_rv - top_r1)
        sums_r1 = jax.lax.psum(jnp.sum(exps_rv, axis=-1, keepdims=True), "tensor")
        hit_rv = (targets_r - first)[:, None] == jnp.arange(v)
        target_logit_r = jnp.sum(jnp.where(hit_rv, logits_rv, 0), axis=-1)
        # every part of V counts its own target logits; part 0 alone counts the normaliser
        normaliser_r = jnp.where(first == 0, (top_r1 + jnp.log(sums_r1))[:, 0], 0)
        total += jnp.sum(jnp.where(mask_r, normaliser_r - target_logit_r, 0))
        dlogits_rv = jnp.where(mask_r[:, None], exps_rv / sums_r1 - hit_rv, 0).astype(x_rD.dtype)
        dx_rD = jnp.einsum("rv,vD->rD", dlogits_rv, head_vD)
        dhead_vD += jnp.einsum("rv,rD->vD", dlogits_rv, x_rD, preferred_element_type=jnp.float32)
        return (total, dhead_vD), dx_rD

    zero = jax.lax.full_like(x_mD, 0, jnp.float32, ())
    start = (zero, jax.lax.full_like(x_mD, 0, jnp.float32, head_vD.shape))
    (total, dhead_vD), dx = jax.lax.scan(chunk, start, (chunked(x_mD), chunked(targets_m), chunked(mask_m)))
    return total, (dx.reshape(-1, x_mD.shape[1])[:m], dhead_vD.astype(head_vD.dtype))


def _chunked_backward(saved, dtotal):
    dx_mD, dhead_vD = saved
    # the scale in float32: rounded to bfloat16 it would bias every gradient by the same factor
    return (dx_mD * dtotal).astype(dx_mD.dtype), (dhead_vD * dtotal).astype(dhead_vD.dtype), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)
