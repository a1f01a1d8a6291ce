"""Filters against a plain reference with a sort, and draws against the probabilities that remain."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train.evaluate.generation.sampling import (
    UNIT,
    DrawIds,
    Sampling,
    TokenMasks,
    choose_tokens,
    filtered_weights,
    sampling_kind,
    sampling_values,
)

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (6, 50)).astype(np.float32)
LOGITS[4] = 0  # all tokens are equally likely
LOGITS[5, 10:] = -np.inf  # most are not allowed


def reference(logits: np.ndarray, sampling: Sampling, seen: np.ndarray) -> np.ndarray:
    """Probabilities that remain of one row, as transformers' processors compute them in this order."""
    penalty = sampling.repetition_penalty
    scores = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits).astype(np.float64)
    scores /= sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.size:
        scores[scores < np.sort(scores)[-sampling.top_k]] = -np.inf
    probabilities = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    if sampling.top_p < 1:
        for token, probability in enumerate(probabilities.copy()):
            # A token stays if those more likely than it do not reach the mass alone.
            if probabilities[probabilities > probability].sum() >= sampling.top_p:
                scores[token] = -np.inf
        probabilities = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    probabilities[probabilities < sampling.min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1, temperature=0.7),
        Sampling(1, temperature=1.5, top_k=5),
        Sampling(1, temperature=1.0, top_k=1000),
        Sampling(1, temperature=1.0, top_p=0.8),
        Sampling(1, temperature=2.0, min_p=0.1),
        Sampling(1, temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.3),
    ],
    ids=["temperature", "top_k", "top_k above V", "top_p", "min_p", "all"],
)
def test_filters_leave_the_probabilities_of_the_reference(sampling: Sampling) -> None:
    seen = RNG.random(LOGITS.shape) < 0.3
    kind = sampling_kind(sampling)
    values = sampling_values(sampling)
    penalty = sampling.repetition_penalty
    scores = np.where(seen, np.where(LOGITS > 0, LOGITS / penalty, LOGITS * penalty), LOGITS) / np.float32(sampling.temperature)
    weights = np.asarray(jax.jit(partial(filtered_weights, kind=kind))(jnp.asarray(scores), values=values))
    for row, logits in enumerate(LOGITS):
        expected = reference(logits, sampling, seen[row])
        np.testing.assert_array_equal(weights[row] > 0, expected * UNIT > 0.5)
        np.testing.assert_allclose(weights[row] / UNIT, expected, atol=1e-6)


def test_draws_have_the_frequencies_of_the_probabilities_that_remain() -> None:
    sampling = Sampling(1, temperature=1.5, top_p=0.9, seed=7)
    count = 20_000
    logits = jnp.tile(LOGITS[:1], (count, 1))
    rows = jnp.arange(count)
    draws = jax.jit(partial(choose_tokens, kind=sampling_kind(sampling)))(
        logits, values=sampling_values(sampling), ids=DrawIds(rows % 100, rows // 100)
    )
    expected = reference(LOGITS[0], sampling, np.zeros(50, bool))
    frequencies = np.bincount(np.asarray(draws.tokens_B), minlength=50) / count
    assert (np.abs(frequencies - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / count)).all()
    # Log-probabilities are the model's own, before temperature and filters.
    np.testing.assert_allclose(draws.logprobs_B[:9], jax.nn.log_softmax(LOGITS[0])[draws.tokens_B[:9]], rtol=1e-5)


def test_only_allowed_tokens_are_chosen() -> None:
    allowed = np.zeros(LOGITS.shape, bool)
    allowed[:, [3, 8]] = True
    for sampling in (Sampling(1), Sampling(1, temperature=5.0, top_k=7)):
        draws = choose_tokens(
            jnp.asarray(LOGITS),
            sampling_kind(sampling),
            sampling_values(sampling),
            DrawIds(jnp.arange(6), jnp.arange(6)),
            TokenMasks(allowed_BV=jnp.asarray(allowed)),
        )
        assert set(np.asarray(draws.tokens_B).tolist()) <= {3, 8}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"temperature": float("nan")}, "temperature is nan; it must be at least 0 and finite"),
        ({"top_k": 0, "temperature": 1.0}, "top_k is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"top_k": 5}, "top_k 5 has no effect at temperature 0"),
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(1, **settings)  # type: ignore[arg-type]
