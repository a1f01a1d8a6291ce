"""Sum of the cross-entropy, computed chunk by chunk: the fast path of next-token training.

The gradient of a chunk is computed in the forward pass, where its logits exist; the backward pass only scales it. This
requires that all tokens share one weight; `token_logprobs` gives each token its own gradient and computes the logits twice.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from moe_train.machine.mesh import global_axes
from moe_train.model.sharding.local_view import index_along, sum_along
from moe_train.train.logits import HeadFactors, LoraFactors, TokenFactors, on_each_device, scan_gradients, target_hits


def cross_entropy_sum(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    loss_mask_BT: Bool[Array, "B T"],
    lora_factors: LoraFactors | None = None,
) -> Float[Array, ""]:
    """Sum -log softmax(hidden · head)[target] over the tokens of the mask.

    If each replica computes on its own (`train.gradients`), the result is the sum over that replica's tokens.

    Args:
        hidden_BTD: hidden states after the final norm.
        head_VD: the output matrix; may be split on D and V.
        targets_BT: the token that each position predicts.
        loss_mask_BT: True for the tokens that are trained on.
        lora_factors: two factors whose product is the LoRA delta of the logits; None without an adapter on the head.

    Returns:
        The sum in nats, a float32 scalar.
    """
    axes = global_axes()

    def local(xs: TokenFactors, heads: HeadFactors, targets_bt: Int[Array, "b t"], mask_bt: Bool[Array, "b t"]) -> Float[Array, ""]:
        total = _chunked(xs, heads, targets_bt.reshape(-1), mask_bt.reshape(-1))
        return sum_along(total, axes)

    return on_each_device(local, hidden_BTD, head_VD, lora_factors, (targets_BT, loss_mask_BT), P())


@jax.custom_vjp
def _chunked(xs: TokenFactors, heads: HeadFactors, targets_m: Int[Array, " m"], mask_m: Bool[Array, " m"]) -> Float[Array, ""]:
    """Compute this device's part of the sum; the parts over `tensor` add up to the loss of its tokens."""
    return _chunked_forward(xs, heads, targets_m, mask_m)[0]


_Gradients = tuple[TokenFactors, HeadFactors]
"""Gradients of the sum, which the forward pass saves for the backward pass."""


def _chunked_forward(
    xs: TokenFactors, heads: HeadFactors, targets_m: Int[Array, " m"], mask_m: Bool[Array, " m"]
) -> tuple[Float[Array, ""], _Gradients]:
    is_first = index_along("tensor") == 0

    def of_logits(
        total: Float[Array, ""], logits_rv: Float[Array, "r v"], chunk: tuple[Int[Array, " r"], Bool[Array, " r"]]
    ) -> tuple[Float[Array, ""], Float[Array, "r v"]]:
        targets_r, mask_r = chunk
        # The maximum over all parts of V. It is a constant per row, so it needs no gradient.
        top_r1 = jax.lax.pmax(jnp.max(logits_rv, axis=-1, keepdims=True), "tensor")
        exps_rv = jnp.exp(logits_rv - top_r1)
        sums_r1 = sum_along(jnp.sum(exps_rv, axis=-1, keepdims=True), "tensor")
        hit_rv = target_hits(targets_r, logits_rv.shape[1])
        target_logit_r = jnp.sum(jnp.where(hit_rv, logits_rv, 0), axis=-1)
        # Every part of V counts its own target logits; only part 0 counts the normalizer.
        normalizer_r = jnp.where(is_first, (top_r1 + jnp.log(sums_r1))[:, 0], 0)
        total += jnp.sum(jnp.where(mask_r, normalizer_r - target_logit_r, 0))
        # The gradient of the cross-entropy: softmax minus one-hot target. Rows that pad the last chunk have the mask False.
        return total, jnp.where(mask_r[:, None], exps_rv / sums_r1 - hit_rv, 0)

    # Made from xs, so that the carry varies along the same mesh axes as what is added to it.
    start = jax.lax.full_like(xs[0], 0, jnp.float32, ())
    scanned = scan_gradients(of_logits, xs, heads, (targets_m, mask_m), start)
    return scanned.total, (scanned.xs, scanned.heads)


def _chunked_backward(saved: _Gradients, dtotal: Float[Array, ""]) -> tuple[TokenFactors, HeadFactors, None, None]:
    # The scale stays in float32: rounded to bfloat16 it would bias every gradient by the same factor.
    dxs, dheads = jax.tree.map(lambda x: (x * dtotal).astype(x.dtype), saved)
    return dxs, dheads, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)
