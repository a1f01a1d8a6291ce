"""How the next token is chosen: settings, filters of the distribution, and draws.

The filters are applied in the order of transformers: repetition penalty, temperature, top-k, top-p, min-p. They need no sort:
each keeps the tokens above a threshold, which is found by bisection over the bits of a float32, in 32 sums over the vocabulary.
Probabilities are summed as integers, so that neither the order of a sum nor the mesh changes which tokens pass.

A draw depends on the seed, the request's index and the position alone: not on the other sequences of a batch, nor on the mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

UNIT = 2**30
"""Integer that stands for probability 1 in sums of probabilities; the sum of all, with every rounding error, fits into int32."""


@dataclass(frozen=True)
class Sampling:
    """How prompts are continued.

    Raises:
        ValueError: a value is outside its range, or has no effect.
    """

    max_tokens: int
    """Maximum number of new tokens per prompt."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end a continuation; empty to generate `max_tokens` tokens always."""
    temperature: float = 0.0
    """0 selects the most likely token; above 0, tokens are drawn from softmax(logits / temperature)."""
    top_k: int | None = None
    """Draw from the k most likely tokens, and any as likely as the last of them; None for all."""
    top_p: float = 1.0
    """Draw from the fewest most likely tokens whose probabilities sum to at least this."""
    min_p: float = 0.0
    """Draw from the tokens that are at least this fraction as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that occur in the prompt or the continuation."""
    seed: int = 0
    """Seed of the draws, from 0 to 2**64 - 1."""

    def __post_init__(self) -> None:
        limits = (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "at least 0 and finite"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < float("inf"), "above 0 and finite"),
            ("seed", self.seed, 0 <= self.seed < 2**64, "from 0 to 2**64 - 1"),
        )
        for name, value, is_valid, limit in limits:
            if not is_valid:
                raise ValueError(f"{name} is {value}; it must be {limit}")
        if self.temperature == 0:
            for name, value, is_default in (
                ("top_k", self.top_k, self.top_k is None),
                ("top_p", self.top_p, self.top_p == 1),
                ("min_p", self.min_p, self.min_p == 0),
            ):
                if not is_default:
                    raise ValueError(f"{name} {value} has no effect at temperature 0; set a temperature above 0, or leave it out")


class SamplingKind(NamedTuple):
    """Which steps of the choice are compiled; their values are arguments of the program."""

    draws: bool
    """Whether tokens are drawn; otherwise the most likely one is taken."""
    top_k: bool
    top_p: bool
    min_p: bool
    penalizes: bool
    """Whether a repetition penalty is applied."""


class SamplingValues(NamedTuple):
    """The values of `Sampling` as scalars on the device."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]
    key: Key[Array, ""]


def sampling_kind(sampling: Sampling) -> SamplingKind:
    """Return which steps the settings need."""
    return SamplingKind(
        draws=sampling.temperature > 0,
        top_k=sampling.top_k is not None,
        top_p=sampling.top_p < 1,
        min_p=sampling.min_p > 0,
        penalizes=sampling.repetition_penalty != 1,
    )


def sampling_values(sampling: Sampling) -> SamplingValues:
    """Return the values of the settings for the device."""
    # A PRNG key is made of 32 bits where 64-bit integers are off, so the upper half of the seed is folded in.
    key = jax.random.fold_in(jax.random.key(sampling.seed % 2**32), sampling.seed // 2**32)
    return SamplingValues(
        temperature=jnp.float32(sampling.temperature or 1.0),
        top_k=jnp.int32(sampling.top_k or 1),
        top_p=jnp.float32(sampling.top_p),
        min_p=jnp.float32(sampling.min_p),
        repetition_penalty=jnp.float32(sampling.repetition_penalty),
        key=key,
    )


class DrawIds(NamedTuple):
    """What the draw of each row depends on, beside the seed."""

    requests_B: Int[Array, " B"]
    """Index of each row's request."""
    positions_B: Int[Array, " B"]
    """Position that the token will have in its sequence."""


class TokenMasks(NamedTuple):
    """Sets of tokens of each row; None where they are not needed."""

    seen_BV: Bool[Array, "B V"] | None = None
    """Tokens of the prompt and the continuation, for the repetition penalty."""
    allowed_BV: Bool[Array, "B V"] | None = None
    """Tokens that may follow, at least one in each row; None for all."""


class Draws(NamedTuple):
    """The tokens that were chosen."""

    tokens_B: Int[Array, " B"]
    logprobs_B: Float[Array, " B"]
    """Log-probability of each token under the model: before penalty, temperature and filters."""


def choose_tokens(
    logits_BV: Float[Array, "B V"],
    kind: SamplingKind,
    values: SamplingValues,
    ids: DrawIds,
    masks: TokenMasks = TokenMasks(),  # noqa: B008 (immutable)
) -> Draws:
    """Choose the next token of each row. Local view.

    Args:
        logits_BV: float32 logits.
        kind: which steps are needed.
        values: their values.
        ids: what the draws depend on.
        masks: tokens that occur, and tokens that are allowed.
    """
    scores_BV = logits_BV
    if kind.penalizes:
        assert masks.seen_BV is not None
        penalty = values.repetition_penalty
        scores_BV = jnp.where(masks.seen_BV, jnp.where(scores_BV > 0, scores_BV / penalty, scores_BV * penalty), scores_BV)
    if masks.allowed_BV is not None:
        scores_BV = jnp.where(masks.allowed_BV, scores_BV, -jnp.inf)
    if kind.draws:
        weights_BV = filtered_weights(scores_BV / values.temperature, kind, values)
        tokens_B = _draw(weights_BV, _row_keys(values.key, ids))
    else:
        tokens_B = _most_likely(scores_BV)
    own_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    return Draws(tokens_B, own_B - jax.nn.logsumexp(logits_BV, axis=-1))


def _most_likely(scores_BV: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Return the first of the largest scores of each row.

    XLA:CPU compares the pairs of `jnp.argmax` one by one; two plain reductions take a quarter of the time.
    """
    V = scores_BV.shape[-1]
    is_smaller_BV = scores_BV < jnp.max(scores_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_smaller_BV, V, jnp.arange(V, dtype=jnp.int32)), axis=-1)


def _row_keys(key: Key[Array, ""], ids: DrawIds) -> Key[Array, " B"]:
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.vmap(jax.random.fold_in)(fold_in(key, ids.requests_B), ids.positions_B)


def filtered_weights(scores_BV: Float[Array, "B V"], kind: SamplingKind, values: SamplingValues) -> Int[Array, "B V"]:
    """Return integers proportional to the probabilities of the tokens that pass all filters, and 0 for the others.

    Args:
        scores_BV: logits after penalty and temperature; -inf for tokens that are not allowed.
        kind: which filters are applied.
        values: their values.
    """
    if kind.top_k:
        # The k-th largest score is the largest threshold that k scores reach.
        scores_BV = _at_least(scores_BV, lambda passing_BV: jnp.sum(passing_BV, axis=-1) >= values.top_k)
    # The most likely token has relative weight 1, so that its own never underflows.
    relative_BV = jnp.exp(scores_BV - jnp.max(scores_BV, axis=-1, keepdims=True))
    weights_BV = _integers(relative_BV)
    if kind.top_p:
        total_B = jnp.sum(weights_BV, axis=-1)
        # The largest threshold whose tokens reach the mass; with a lower one, fewer tokens would have sufficed.
        target_B = jnp.maximum(jnp.ceil(values.top_p * total_B.astype(jnp.float32)).astype(jnp.int32), 1)
        target_B = jnp.minimum(target_B, total_B)
        relative_BV = _at_least(relative_BV, lambda passing_BV: jnp.sum(jnp.where(passing_BV, weights_BV, 0), axis=-1) >= target_B)
    if kind.min_p:
        relative_BV = jnp.where(relative_BV >= values.min_p, relative_BV, -jnp.inf)
    passes_BV = relative_BV > -jnp.inf
    return _integers(jnp.where(passes_BV, relative_BV, 0))


def _integers(relative_BV: Float[Array, "B V"]) -> Int[Array, "B V"]:
    """Return the probabilities in proportion to `relative_BV`, in units of 1 / UNIT."""
    shares_BV = relative_BV / jnp.sum(relative_BV, axis=-1, keepdims=True)
    return jnp.round(shares_BV * UNIT).astype(jnp.int32)


def _at_least(x_BV: Float[Array, "B V"], suffices: Callable[[Bool[Array, "B V"]], Bool[Array, " B"]]) -> Float[Array, "B V"]:
    """Return x where it reaches the largest threshold that suffices, and -inf elsewhere.

    Args:
        x_BV: values.
        suffices: whether the entries that reach a threshold (B, V) are enough (B,). It is true of all entries, and remains true
            if entries are added.
    """
    bits_BV = _ordered_bits(x_BV)

    def bit(i: Int[Array, ""], threshold_B: UInt32[Array, " B"]) -> UInt32[Array, " B"]:
        higher_B = threshold_B | (jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32)))
        return jnp.where(suffices(bits_BV >= higher_B[:, None]), higher_B, threshold_B)

    threshold_B = jax.lax.fori_loop(0, 32, bit, jnp.zeros_like(bits_BV[:, 0]))
    return jnp.where(bits_BV >= threshold_B[:, None], x_BV, -jnp.inf)


def _ordered_bits(x: Float[Array, "*dims"]) -> UInt32[Array, "*dims"]:
    """Return unsigned integers in the order of float32 numbers."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    # Negative numbers have the sign bit and decrease with their bits; 0 and -0 are adjacent, which no filter minds.
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(2**31))


def _draw(weights_BV: Int[Array, "B V"], keys_B: Key[Array, " B"]) -> Int[Array, " B"]:
    """Draw a token of each row in proportion to integer weights, by inverting the cumulative distribution."""
    totals_B = jnp.sum(weights_BV, axis=-1)
    points_B = jax.vmap(lambda key, total: jax.random.randint(key, (), 0, total))(keys_B, totals_B)
    V = weights_BV.shape[1]
    tokens_V = jnp.arange(V, dtype=jnp.int32)

    def halve(_: int, bounds: tuple[Int[Array, " B"], Int[Array, " B"]]) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        low_B, high_B = bounds  # the token is in [low, high]
        middle_B = (low_B + high_B) // 2
        mass_B = jnp.sum(jnp.where(tokens_V <= middle_B[:, None], weights_BV, 0), axis=-1)
        is_left_B = mass_B > points_B
        return jnp.where(is_left_B, low_B, middle_B + 1), jnp.where(is_left_B, middle_B, high_B)

    first_B = jnp.zeros_like(points_B)
    return jax.lax.fori_loop(0, V.bit_length(), halve, (first_B, first_B + (V - 1)))[0]
