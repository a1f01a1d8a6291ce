"""The epsilon of the latents' norms in files."""

from __future__ import annotations

from moe_train import config

LATENT_NORM_EPS = 1e-6
"""Epsilon of the norms of both latents, whatever the model's `norm_eps`: transformers has it hard-wired."""


def check_latent_norm_eps(model: config.Model, reader: str) -> None:
    """Raise ValueError if a reader that applies `norm_eps` to the latents' norms too would compute the model differently.

    Args:
        model: the architecture.
        reader: the reader's name, for the message.
    """
    if isinstance(model.attention, config.MultiHeadLatentAttention) and model.norm_eps != LATENT_NORM_EPS:
        raise ValueError(
            f"norm_eps is {model.norm_eps:g}; {reader} uses it for the norms of latents too, where only {LATENT_NORM_EPS:g} is "
            "supported"
        )
