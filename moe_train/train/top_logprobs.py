"""The most likely tokens of each prediction with their log-probabilities: what a teacher leaves behind for its students.

Logits exist for one chunk of tokens at a time (`train.logits`). There is no gradient: a teacher is not trained.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num

from moe_train.machine.mesh import axis_size, batch_axes
from moe_train.model.sharding.local_view import index_along
from moe_train.model.sharding.specs import plain_on_one_device
from moe_train.train.logits import HeadFactors, LoraFactors, TokenFactors, map_chunks, on_each_device

LOWEST = -1e30
"""Stands for the log-probability of a token that is not allowed; finite, so that differences stay numbers."""


class TopLogprobs(NamedTuple):
    """The k most likely tokens of each prediction under softmax(logits / temperature)."""

    ids: Int[Array, "B T k"]
    """Their ids, the most likely first."""
    logprobs: Float[Array, "B T k"]
    """Their log-probabilities, in nats."""
    tail: Float[Array, "B T"]
    """Log of the probability of all other tokens together; -inf if there are none."""


class TopSettings(NamedTuple):
    """What is computed of each prediction."""

    num_tokens: int
    """How many are kept of each prediction (k)."""
    temperature: float
    """Divisor of the logits."""
    vocab_size: int
    """Ids from this one on belong to the tail: rows that pad the head, or ids that a student does not have."""


def top_logprobs(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    settings: TopSettings,
    lora_factors: LoraFactors | None = None,
) -> TopLogprobs:
    """Compute the most likely tokens of every prediction, with the vocabulary split over `tensor`.

    Args:
        hidden_BTD: hidden states after the final norm.
        head_VD: the output matrix; may be split on D and V.
        settings: number of tokens and temperature.
        lora_factors: two factors whose product is the LoRA delta of the logits; None without an adapter on the head.
    """
    per_token = P(batch_axes(), "context")
    per_candidate = P(batch_axes(), "context", None)

    def local(
        xs: TokenFactors, heads: HeadFactors, shape_bt: Int[Array, "b t"]
    ) -> tuple[Int[Array, "b t k"], Float[Array, "b t k"], Float[Array, "b t"]]:
        ids_mk, logprobs_mk, tail_m = map_chunks(lambda logits_rv, _: _top_of_chunk(logits_rv, settings), xs, heads)
        b, t = shape_bt.shape
        return ids_mk.reshape(b, t, -1), logprobs_mk.reshape(b, t, -1), tail_m.reshape(b, t)

    # An array of one value per token, which only hands its local shape to `local`.
    like_BT = jnp.zeros_like(hidden_BTD[..., 0], jnp.int32)
    out_specs = (per_candidate, per_candidate, per_token)
    return TopLogprobs(*plain_on_one_device(on_each_device(local, hidden_BTD, head_VD, lora_factors, (like_BT,), out_specs)))


def _top_of_chunk(
    logits_rv: Float[Array, "r v"], settings: TopSettings
) -> tuple[Int[Array, "r k"], Float[Array, "r k"], Float[Array, " r"]]:
    """Return (ids, log-probabilities, log of the tail's mass) for a chunk; equal on all devices along `tensor`."""
    logits_rv = logits_rv / settings.temperature
    r, v = logits_rv.shape
    first = index_along("tensor") * v
    top_r = jax.lax.pmax(jnp.max(logits_rv, axis=-1), "tensor")
    shifted_rv = logits_rv - top_r[:, None]
    allowed_v = first + jnp.arange(v) < settings.vocab_size
    # The best of each part of the vocabulary, of which the best of all are chosen.
    values_rk, places_rk = jax.lax.top_k(jnp.where(allowed_v, shifted_rv, LOWEST), min(settings.num_tokens, v))
    values_rn = _from_all_parts(values_rk)
    ids_rn = _from_all_parts(places_rk + first)
    values_rk, order_rk = jax.lax.top_k(values_rn, settings.num_tokens)
    ids_rk = jnp.take_along_axis(ids_rn, order_rk, axis=-1)
    places_rk = ids_rk - first
    is_local = (places_rk >= 0) & (places_rk < v)
    # A sum over the rest and not 1 minus a sum, which would lose the digits of a small tail.
    exps_rv = jnp.exp(shifted_rv)
    rest_rv = exps_rv.at[jnp.arange(r)[:, None], jnp.where(is_local, places_rk, v)].set(0, mode="drop")
    normalizer_r, rest_r = jax.lax.psum((jnp.sum(exps_rv, axis=-1), jnp.sum(rest_rv, axis=-1)), "tensor")
    log_sum_r = jnp.log(normalizer_r)
    return ids_rk, values_rk - log_sum_r[:, None], jnp.log(rest_r) - log_sum_r


def _from_all_parts(x_rk: Num[Array, "r k"]) -> Num[Array, "r n"]:
    """Concatenate the columns of all devices along `tensor`; the result is known to be equal on all of them."""
    parts = axis_size("tensor")
    mine = jnp.arange(parts) == index_along("tensor")
    # A sum and not an all-gather, whose result counts as different on each device.
    spread = jnp.where(mine[:, None, None], x_rk[None], 0)
    gathered = jax.lax.psum(spread, "tensor")
    return jnp.moveaxis(gathered, 0, 1).reshape(x_rk.shape[0], -1)
