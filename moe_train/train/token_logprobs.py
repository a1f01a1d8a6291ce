"""Log-probability and entropy of every token, chunk by chunk: the basis of all objectives except plain next-token training.

Nothing of size (tokens, V) is saved: the backward pass computes the logits of each chunk again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from moe_train.machine.mesh import batch_axes
from moe_train.model.layers import keys_of
from moe_train.model.moe.router import RouterStats
from moe_train.model.sharding.specs import plain_on_one_device
from moe_train.model.transformer import Transformer
from moe_train.train.logits import HeadFactors, LoraFactors, TokenFactors, map_chunks, on_each_device, scan_gradients, target_hits


class TokenLogprobs(NamedTuple):
    """Log-probability and entropy of each token, in nats, in float32."""

    logprob: Float[Array, "B T"]
    """log softmax(logits)[target]."""
    entropy: Float[Array, "B T"]
    """Entropy of softmax(logits)."""


class _Saved(NamedTuple):
    """Residuals of the backward pass: the inputs, and three numbers per token."""

    xs: TokenFactors
    heads: HeadFactors
    targets_m: Int[Array, " m"]
    top_m: Float[Array, " m"]
    """The largest logit of each token."""
    log_sum_m: Float[Array, " m"]
    """Log-sum-exp of the logits minus the largest logit."""
    entropy_m: Float[Array, " m"]


def token_logprobs(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    lora_factors: LoraFactors | None = None,
) -> TokenLogprobs:
    """Compute the log-probability of each target and the entropy of each prediction under softmax(hidden · head).

        hidden, routers = model(tokens)
        logprobs = moe_train.token_logprobs(hidden, model.head_weight(), targets).logprob

    Both have exact gradients with respect to hidden_BTD, head_VD and lora_factors. Padding has values, too: mask them before
    summing.

    Args:
        hidden_BTD: hidden states after the final norm.
        head_VD: the output matrix; may be split on D and V.
        targets_BT: the token that each position predicts.
        lora_factors: two factors whose product is the LoRA delta of the logits; None without an adapter on the head.
    """
    tokens = P(batch_axes(), "context")

    def local(
        xs: TokenFactors, heads: HeadFactors, targets_bt: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
        logprob_m, entropy_m = _chunked(xs, heads, targets_bt.reshape(-1))
        return logprob_m.reshape(targets_bt.shape), entropy_m.reshape(targets_bt.shape)

    outputs = on_each_device(local, hidden_BTD, head_VD, lora_factors, (targets_BT,), (tokens, tokens))
    return TokenLogprobs(*plain_on_one_device(outputs))


def batch_logprobs(model: Transformer, batch: Any, key: Key[Array, ""] | None = None) -> tuple[TokenLogprobs, RouterStats | None]:
    """Compute `token_logprobs` of a model on a batch's targets.

    Args:
        model: the model.
        batch: a batch with tokens, positions, segment_ids and targets, (B, T) each, and prompt_ids where segments continue another.
        key: PRNG key for the dropout of the adapters; None for no dropout.

    Returns:
        The log-probabilities, and the routers' statistics or None for a dense model.
    """
    body_key, head_key = keys_of(key, 2)
    prompt_ids_BT = getattr(batch, "prompt_ids", None)
    hidden_BTD, routers = model(batch.tokens, batch.positions, batch.segment_ids, body_key, prompt_ids_BT=prompt_ids_BT)
    lora_factors = model.head_lora_factors(hidden_BTD, head_key)
    return token_logprobs(hidden_BTD, model.head_weight(), batch.targets, lora_factors), routers


@jax.custom_vjp
def _chunked(xs: TokenFactors, heads: HeadFactors, targets_m: Int[Array, " m"]) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """Compute (log-probability, entropy) of this device's tokens; equal on all devices along `tensor`."""
    return _chunked_forward(xs, heads, targets_m)[0]


def _chunked_forward(
    xs: TokenFactors, heads: HeadFactors, targets_m: Int[Array, " m"]
) -> tuple[tuple[Float[Array, " m"], Float[Array, " m"]], _Saved]:
    def of_logits(logits_rv: Float[Array, "r v"], targets_r: Int[Array, " r"]) -> tuple[Float[Array, " r"], ...]:
        top_r = jax.lax.pmax(jnp.max(logits_rv, axis=-1), "tensor")
        # Relative to the largest logit, so that large logits lose no digits in the differences below.
        shifted_rv = logits_rv - top_r[:, None]
        exps_rv = jnp.exp(shifted_rv)
        sums = (
            jnp.sum(exps_rv, axis=-1),
            jnp.sum(exps_rv * shifted_rv, axis=-1),
            jnp.sum(jnp.where(target_hits(targets_r, logits_rv.shape[1]), shifted_rv, 0), axis=-1),
        )
        normalizer_r, weighted_r, target_r = jax.lax.psum(sums, "tensor")
        # With logits l relative to the largest and Z = sum exp(l): entropy = log Z - sum exp(l) * l / Z.
        log_sum_r = jnp.log(normalizer_r)
        return target_r - log_sum_r, log_sum_r - weighted_r / normalizer_r, top_r, log_sum_r

    logprob_m, entropy_m, top_m, log_sum_m = map_chunks(of_logits, xs, heads, targets_m)
    return (logprob_m, entropy_m), _Saved(xs, heads, targets_m, top_m, log_sum_m, entropy_m)


_Cotangents = tuple[Float[Array, " m"], Float[Array, " m"]]
"""Gradients of log-probability and entropy."""


def _chunked_backward(saved: _Saved, cotangents: _Cotangents) -> tuple[TokenFactors, HeadFactors, None]:
    def of_logits(
        _: tuple[()], logits_rv: Float[Array, "r v"], chunk: tuple[_Saved, _Cotangents]
    ) -> tuple[tuple[()], Float[Array, "r v"]]:
        at_r, (dlogprob_r, dentropy_r) = chunk
        logprobs_rv = logits_rv - at_r.top_m[:, None] - at_r.log_sum_m[:, None]
        probs_rv = jnp.exp(logprobs_rv)
        # d logprob / d logit = [is target] - p, and d entropy / d logit = -p * (log p + entropy).
        dlogits_rv = dlogprob_r[:, None] * (target_hits(at_r.targets_m, logits_rv.shape[1]) - probs_rv)
        return (), dlogits_rv - dentropy_r[:, None] * probs_rv * (logprobs_rv + at_r.entropy_m[:, None])

    # The factors of the logits are split by the scan itself.
    per_token = (saved._replace(xs=(), heads=()), cotangents)
    scanned = scan_gradients(of_logits, saved.xs, saved.heads, per_token)
    return scanned.xs, scanned.heads, None


_chunked.defvjp(_chunked_forward, _chunked_backward)
