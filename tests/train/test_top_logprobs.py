"""The most likely tokens of each prediction, with their log-probabilities and the mass of the rest."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from moe_train.train.top_logprobs import TopSettings, top_logprobs
from tests.train.test_chosen_logprobs import MESHES, TEMPERATURE, K, V, on_mesh, operands, plain_logits


@pytest.mark.parametrize("mesh", MESHES)
def test_the_most_likely_tokens(mesh: str) -> None:
    """Ids beyond the vocabulary belong to the tail."""
    inputs = operands()[0]
    logprobs = np.asarray(jax.nn.log_softmax(plain_logits(inputs) / TEMPERATURE))
    order = np.argsort(-logprobs[..., : V - 3], axis=-1)
    with jax.set_mesh(MESHES[mesh]):
        hidden, head, *factors = on_mesh(MESHES[mesh], inputs)[0]
        for count in (1, K):
            compute = jax.jit(partial(top_logprobs, settings=TopSettings(count, TEMPERATURE, V - 3)))
            found = jax.device_get(compute(hidden, head, lora_factors=tuple(factors)))
            ids = order[..., :count]
            np.testing.assert_array_equal(found.ids, ids)
            np.testing.assert_allclose(found.logprobs, np.take_along_axis(logprobs, ids, -1), rtol=1e-5, atol=1e-5)
            rest = np.exp(logprobs)
            np.put_along_axis(rest, ids, 0, -1)
            np.testing.assert_allclose(found.tail, np.log(rest.sum(-1)), rtol=1e-5, atol=1e-5)
