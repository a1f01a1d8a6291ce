"""Losses of pairs against formulas in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train import config
from moe_train.train.objectives.preference_losses import PairLogprobs, pair_losses, start_loss

LOSSES = {
    "sigmoid": {},
    "sigmoid, normalized": {"length_normalized": True},
    "ipo": {},
    "hinge": {},
    "robust": {"label_smoothing": 0.2},
    "apo_zero": {},
    "apo_down": {},
    "simpo": {"margin": 0.3},
    "simpo, smoothed": {"label_smoothing": 0.1},
    "orpo": {},
}


def section_of(name: str) -> config.Preference:
    return config.Preference.model_validate({"name": "preference", "loss": name.split(",")[0], "beta": 0.4, **LOSSES[name]})


def in_numpy(section: config.Preference, pairs: PairLogprobs) -> np.ndarray:
    """The published formulas, in float64."""
    l_w, l_l, ref_w, ref_l, n_w, n_l = (np.asarray(x, np.float64) for x in pairs)
    b, e = section.beta, section.label_smoothing
    r_w, r_l = l_w - ref_w, l_l - ref_l

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    d = r_w / n_w - r_l / n_l if section.length_normalized else r_w - r_l
    simpo = b * (l_w / n_w - l_l / n_l) - (section.margin if section.margin is not None else 0.5)
    odds_w, odds_l = (np.exp(x / n) / (1 - np.exp(x / n)) for x, n in ((l_w, n_w), (l_l, n_l)))
    return {
        "sigmoid": -np.log(sigmoid(b * d)),
        "ipo": (r_w / n_w - r_l / n_l - 1 / (2 * b)) ** 2,
        "hinge": np.maximum(0, 1 - b * d),
        "robust": (-(1 - e) * np.log(sigmoid(b * d)) + e * np.log(sigmoid(-b * d))) / (1 - 2 * e),
        "apo_zero": 1 - sigmoid(b * r_w) + sigmoid(b * r_l),
        "apo_down": sigmoid(b * r_w) + 1 - sigmoid(b * (r_w - r_l)),
        "simpo": -(1 - e) * np.log(sigmoid(simpo)) - e * np.log(sigmoid(-simpo)),
        "orpo": -b * np.log(sigmoid(np.log(odds_w / odds_l))),
    }[section.loss]


def pairs(count: int = 64) -> PairLogprobs:
    rng = np.random.default_rng(0)
    n_w, n_l = rng.integers(1, 9, (2, count)).astype(np.float32)
    l_w, l_l, ref_w, ref_l = (-rng.gamma(1.0, 2.0, (4, count)) - 1e-3).astype(np.float32)
    # From answers that are almost certain to unlikely ones.
    return PairLogprobs(*map(jnp.asarray, (l_w * n_w, l_l * n_l, ref_w * n_w, ref_l * n_l, n_w, n_l)))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_the_papers(name: str) -> None:
    section = section_of(name)
    losses = np.asarray(pair_losses(section, pairs()))
    np.testing.assert_allclose(losses, in_numpy(section, pairs()), rtol=3e-5, atol=1e-6)
    gradients = jax.grad(lambda values: pair_losses(section, values).sum())(PairLogprobs(*pairs()))
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", [name for name in LOSSES if "simpo" not in name and name != "orpo"])
def test_a_model_that_equals_its_reference_starts_at_a_known_loss(name: str) -> None:
    section = section_of(name)
    equal = pairs()._replace(reference_chosen=pairs().chosen, reference_rejected=pairs().rejected)
    np.testing.assert_allclose(pair_losses(section, equal), start_loss(section), rtol=1e-6)


def test_losses_without_a_reference_have_no_known_start() -> None:
    assert start_loss(section_of("simpo")) is None and start_loss(section_of("orpo")) is None
    assert start_loss(config.UnpairedPreference(name="unpaired_preference")) == 0.5
