"""Only models with latents need the epsilon of their norms."""

from __future__ import annotations

import pytest

from moe_train.weights.latent_norms import check_latent_norm_eps
from tests.tiny import MIXTRAL
from tests.weights.mistral.models import MISTRAL4


def test_the_epsilon_of_latents_is_the_models_or_the_file_would_change_it() -> None:
    check_latent_norm_eps(MISTRAL4, "vLLM")
    check_latent_norm_eps(MIXTRAL, "vLLM")
    with pytest.raises(ValueError, match=r"norm_eps is 1e-05; vLLM uses it for the norms of latents too"):
        check_latent_norm_eps(MISTRAL4.model_copy(update={"norm_eps": 1e-5}), "vLLM")
