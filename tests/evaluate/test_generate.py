"""Generation in a single call."""

from __future__ import annotations

import jax

from moe_train.evaluate.generate import GenerationOptions, generate_tokens
from moe_train.evaluate.generation.generator import Generator
from moe_train.evaluate.generation.sampling import Sampling
from moe_train.model.parameters import combine
from tests.evaluate.tiny_generator import MIXTRAL, ONE, random_model


def test_one_call_gives_the_tokens_of_a_generator() -> None:
    with jax.set_mesh(ONE):
        structure, weights = random_model(MIXTRAL)
        tokens = generate_tokens(structure, weights, MIXTRAL, ONE, [[1, 2, 3]], GenerationOptions(4, (5,), 0.5, seed=3))
        (completion,) = Generator(combine(structure, weights), MIXTRAL, ONE).generate(
            [[1, 2, 3]], Sampling(4, (5,), temperature=0.5, seed=3)
        )
    assert tokens == [completion.tokens]
