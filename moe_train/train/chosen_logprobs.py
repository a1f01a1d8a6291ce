"""Log-probabilities of several given tokens at each position, and of all other tokens together, chunk by chunk.

A student is compared with a teacher on the teacher's most likely tokens. As in `token_logprobs`, nothing of size (tokens, V)
is saved: the backward pass computes the logits of each chunk again.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from moe_train.machine.mesh import batch_axes
from moe_train.model.sharding.local_view import index_along
from moe_train.model.sharding.specs import plain_on_one_device
from moe_train.train.logits import HeadFactors, LoraFactors, TokenFactors, map_chunks, on_each_device, scan_gradients, target_hits

_SMALLEST = float(np.finfo(np.float32).tiny)


class ChosenLogprobs(NamedTuple):
    """Log-probabilities, in nats, in float32; those of chosen tokens and tail are at the temperature."""

    chosen: Float[Array, "B T k"]
    """log softmax(logits / temperature) at the chosen tokens."""
    tail: Float[Array, "B T"]
    """Log of the probability of all other tokens together, at least the log of the smallest float."""
    target: Float[Array, "B T"]
    """log softmax(logits)[target], without a temperature."""
    largest: Float[Array, "B T"]
    """The largest log-probability at the temperature; no gradient."""
    entropy: Float[Array, "B T"]
    """Entropy of softmax(logits / temperature); no gradient."""


class _Inputs(NamedTuple):
    """Ids of one chunk, or of this device's tokens."""

    chosen_mk: Int[Array, "m k"]
    targets_m: Int[Array, " m"]


class _Saved(NamedTuple):
    """Residuals of the backward pass: the inputs, and a few numbers per token."""

    xs: TokenFactors
    heads: HeadFactors
    inputs: _Inputs
    top_m: Float[Array, " m"]
    """The largest logit of each token."""
    log_sum_m: Float[Array, " m"]
    """Log-sum-exp of (logits - largest logit) / temperature."""
    plain_log_sum_m: Float[Array, " m"]
    """Log-sum-exp of logits - largest logit."""
    tail_m: Float[Array, " m"]


_Outputs = tuple[Float[Array, "..."], ...]
"""Arrays in the order of the fields of `ChosenLogprobs`."""


def chosen_logprobs(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    chosen_BTk: Int[Array, "B T k"],
    targets_BT: Int[Array, "B T"],
    temperature: float,
    lora_factors: LoraFactors | None = None,
) -> ChosenLogprobs:
    """Compute the log-probabilities of k different tokens, of the rest and of the target at each position.

    Gradients with respect to hidden_BTD, head_VD and lora_factors are exact. Padding has values, too: mask them before summing.

    Args:
        hidden_BTD: hidden states after the final norm.
        head_VD: the output matrix; may be split on D and V.
        chosen_BTk: the tokens, k different ones at each position.
        targets_BT: the token that each position predicts.
        temperature: divisor of the logits.
        lora_factors: two factors whose product is the LoRA delta of the logits; None without an adapter on the head.
    """
    per_token = P(batch_axes(), "context")
    per_choice = P(batch_axes(), "context", None)

    def local(xs: TokenFactors, heads: HeadFactors, chosen_btk: Int[Array, "b t k"], targets_bt: Int[Array, "b t"]) -> _Outputs:
        inputs = _Inputs(chosen_btk.reshape(-1, chosen_btk.shape[-1]), targets_bt.reshape(-1))
        outputs = _chunked(temperature, xs, heads, inputs)
        return tuple(x.reshape(*targets_bt.shape, *x.shape[1:]) for x in outputs)

    out_specs = (per_choice, per_token, per_token, per_token, per_token)
    outputs = on_each_device(local, hidden_BTD, head_VD, lora_factors, (chosen_BTk, targets_BT), out_specs)
    chosen, tail, target, largest, entropy = plain_on_one_device(outputs)
    return ChosenLogprobs(chosen, tail, target, jax.lax.stop_gradient(largest), jax.lax.stop_gradient(entropy))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(temperature: float, xs: TokenFactors, heads: HeadFactors, inputs: _Inputs) -> _Outputs:
    """Compute the outputs for this device's tokens; equal on all devices along `tensor`."""
    return _chunked_forward(temperature, xs, heads, inputs)[0]


def _chunked_forward(temperature: float, xs: TokenFactors, heads: HeadFactors, inputs: _Inputs) -> tuple[_Outputs, _Saved]:
    v = heads[0].shape[0]

    def of_logits(logits_rv: Float[Array, "r v"], chunk: _Inputs) -> tuple[Float[Array, "..."], ...]:
        chosen_rk, targets_r = chunk
        top_r = jax.lax.pmax(jnp.max(logits_rv, axis=-1), "tensor")
        # Relative to the largest logit, so that large logits lose no digits in the differences below.
        shifted_rv = logits_rv - top_r[:, None]
        tempered_rv = shifted_rv / temperature
        exps_rv = jnp.exp(tempered_rv)
        places = _places(chosen_rk, v)
        sums = (
            jnp.sum(exps_rv, axis=-1),
            # A sum over the rest and not 1 minus a sum, which would lose the digits of a small tail.
            jnp.sum(places.cleared(exps_rv), axis=-1),
            jnp.sum(exps_rv * tempered_rv, axis=-1),
            places.values(tempered_rv),
            jnp.sum(jnp.exp(shifted_rv), axis=-1),
            jnp.sum(jnp.where(target_hits(targets_r, v), shifted_rv, 0), axis=-1),
        )
        normalizer_r, rest_r, weighted_r, chosen_rk, plain_normalizer_r, target_r = jax.lax.psum(sums, "tensor")
        log_sum_r = jnp.log(normalizer_r)
        plain_log_sum_r = jnp.log(plain_normalizer_r)
        # The floor keeps a tail that underflows finite; its gradient is 0 then.
        tail_r = jnp.log(jnp.maximum(rest_r, _SMALLEST)) - log_sum_r
        entropy_r = log_sum_r - weighted_r / normalizer_r
        outputs = (chosen_rk - log_sum_r[:, None], tail_r, target_r - plain_log_sum_r, -log_sum_r, entropy_r)
        return *outputs, top_r, log_sum_r, plain_log_sum_r

    *outputs, top_m, log_sum_m, plain_log_sum_m = map_chunks(of_logits, xs, heads, inputs)
    return tuple(outputs), _Saved(xs, heads, inputs, top_m, log_sum_m, plain_log_sum_m, outputs[1])


def _chunked_backward(temperature: float, saved: _Saved, cotangents: _Outputs) -> tuple[TokenFactors, HeadFactors, None]:
    v = saved.heads[0].shape[0]

    def of_logits(
        _: tuple[()], logits_rv: Float[Array, "r v"], chunk: tuple[_Saved, _Outputs]
    ) -> tuple[tuple[()], Float[Array, "r v"]]:
        at_r, (dchosen_rk, dtail_r, dtarget_r) = chunk
        shifted_rv = logits_rv - at_r.top_m[:, None]
        log_q_rv = shifted_rv / temperature - at_r.log_sum_m[:, None]
        places = _places(at_r.inputs.chosen_mk, v)
        # With q the softmax at the temperature: d log q_i / d logit_v = ([v = i] - q_v) / temperature, and for the tail's mass t
        # d log t / d logit_v = ([v in the tail] q_v / t - q_v) / temperature.
        total_r = jnp.sum(dchosen_rk, axis=-1) + dtail_r
        of_tail_rv = places.cleared(jnp.exp(log_q_rv - at_r.tail_m[:, None]))
        # Where the tail is at its floor, its gradient is left out.
        is_above = at_r.tail_m + at_r.log_sum_m > jnp.log(2 * _SMALLEST)
        dlogits_rv = jnp.where(is_above, dtail_r, 0)[:, None] * of_tail_rv - total_r[:, None] * jnp.exp(log_q_rv)
        dlogits_rv = places.added(dlogits_rv, dchosen_rk) / temperature
        probs_rv = jnp.exp(shifted_rv - at_r.plain_log_sum_m[:, None])
        return (), dlogits_rv + dtarget_r[:, None] * (target_hits(at_r.inputs.targets_m, v) - probs_rv)

    # The factors of the logits are split by the scan itself. The last two outputs have no gradient.
    per_token = (saved._replace(xs=(), heads=()), cotangents[:3])
    scanned = scan_gradients(of_logits, saved.xs, saved.heads, per_token)
    return scanned.xs, scanned.heads, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


class _Places(NamedTuple):
    """Where the chosen tokens are in this device's part of the vocabulary."""

    columns_rk: Int[Array, "r k"]
    """Columns; the number of columns for a token of another device's part."""
    is_local_rk: Bool[Array, "r k"]

    def values(self, x_rv: Float[Array, "r v"]) -> Float[Array, "r k"]:
        """Return the values of the chosen tokens; 0 for those of other devices."""
        taken_rk = jnp.take_along_axis(x_rv, jnp.minimum(self.columns_rk, x_rv.shape[1] - 1), axis=-1)
        return jnp.where(self.is_local_rk, taken_rk, 0)

    def cleared(self, x_rv: Float[Array, "r v"]) -> Float[Array, "r v"]:
        """Return x with 0 at the chosen tokens."""
        return x_rv.at[jnp.arange(x_rv.shape[0])[:, None], self.columns_rk].set(0, mode="drop")

    def added(self, x_rv: Float[Array, "r v"], values_rk: Float[Array, "r k"]) -> Float[Array, "r v"]:
        """Return x with values added at the chosen tokens."""
        return x_rv.at[jnp.arange(x_rv.shape[0])[:, None], self.columns_rk].add(values_rk, mode="drop")


def _places(chosen_rk: Int[Array, "r k"], vocabulary: int) -> _Places:
    columns_rk = chosen_rk - index_along("tensor") * vocabulary
    is_local_rk = (columns_rk >= 0) & (columns_rk < vocabulary)
    return _Places(jnp.where(is_local_rk, columns_rk, vocabulary), is_local_rk)
