"""Losses of preference pairs from the log-probabilities of their answers; the values are those of TRL 1.16.

r is the log-probability of an answer under the model minus that under the reference, l the former alone, n its number of tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_train import config

SIMPO_MARGIN = 0.5
"""The margin of SimPO where the config states none, as in TRL."""


class PairLogprobs(NamedTuple):
    """Log-probabilities of the answers of pairs, summed over their tokens."""

    chosen: Float[Array, "*pairs"]
    rejected: Float[Array, "*pairs"]
    reference_chosen: Float[Array, "*pairs"]
    """Not read by a loss without a reference."""
    reference_rejected: Float[Array, "*pairs"]
    chosen_tokens: Float[Array, "*pairs"]
    """Number of tokens of each chosen answer, its end token included; at least 1."""
    rejected_tokens: Float[Array, "*pairs"]


def pair_losses(section: config.Preference, pairs: PairLogprobs) -> Float[Array, "*pairs"]:
    """Return the loss of each pair, without terms that average over tokens (`sft_weight`, and the likelihood in ORPO)."""
    beta = section.beta
    chosen = pairs.chosen
    rejected = pairs.rejected
    if section.has_reference:
        chosen = chosen - pairs.reference_chosen
        rejected = rejected - pairs.reference_rejected
    if section.length_normalized or section.loss in ("ipo", "simpo", "orpo"):
        chosen = chosen / pairs.chosen_tokens
        rejected = rejected / pairs.rejected_tokens
    difference = chosen - rejected
    match section.loss:
        case "sigmoid":
            return -jax.nn.log_sigmoid(beta * difference)
        case "hinge":
            return jax.nn.relu(1 - beta * difference)
        case "ipo":
            return jnp.square(difference - 1 / (2 * beta))
        case "robust":
            return _smoothed(beta * difference, section.label_smoothing, sign=-1) / (1 - 2 * section.label_smoothing)
        case "apo_zero":
            return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)
        case "apo_down":
            return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * difference)
        case "simpo":
            margin = SIMPO_MARGIN if section.margin is None else section.margin
            return _smoothed(beta * difference - margin, section.label_smoothing, sign=1)
        case "orpo":
            return -beta * jax.nn.log_sigmoid(log_odds_ratio(chosen, rejected))


def _smoothed(logits: Float[Array, "*pairs"], label_smoothing: float, sign: int) -> Float[Array, "*pairs"]:
    """Return the loss of pairs of which a share is labelled the wrong way round: the share's own loss is added or subtracted."""
    right = -jax.nn.log_sigmoid(logits) * (1 - label_smoothing)
    return right - sign * jax.nn.log_sigmoid(-logits) * label_smoothing


def log_odds_ratio(chosen: Float[Array, "*pairs"], rejected: Float[Array, "*pairs"]) -> Float[Array, "*pairs"]:
    """Return log(odds of chosen / odds of rejected), given the mean log-probability of a token of each (ORPO, eq. 4 and 7)."""
    return (chosen - rejected) - (_log_one_minus_exp(chosen) - _log_one_minus_exp(rejected))


def _log_one_minus_exp(x: Float[Array, "*pairs"]) -> Float[Array, "*pairs"]:
    """Return log(1 - exp(x)) for x < 0 without losing digits at either end."""
    is_near_zero = x > -math.log(2)
    # Each branch gets an argument at which its gradient is finite, since `where` differentiates both.
    near = jnp.log(-jnp.expm1(jnp.where(is_near_zero, x, -0.5)))
    far = jnp.log1p(-jnp.exp(jnp.where(is_near_zero, -1.0, x)))
    return jnp.where(is_near_zero, near, far)


def start_loss(section: config.Preference | config.UnpairedPreference) -> float | None:
    """Return the loss of a model that equals its reference, without `sft_weight`; None for a loss without a reference.

    That of unpaired preferences is a mean over answers, in units of their weights (see `unpaired_preference`).
    """
    match section.loss:
        case "sigmoid" | "robust":
            return math.log(2)
        case "hinge" | "apo_zero" | "apo_down":
            return 1.0
        case "ipo":
            return 1 / (4 * section.beta**2)
        case "kto":
            return 0.5
        case _:
            return None
