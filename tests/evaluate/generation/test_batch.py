"""Rows of a batch: refilled with waiting prompts, and freed by stop texts between blocks."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from moe_train.evaluate.generation.batch import ContinuationPlan
from moe_train.evaluate.generation.completion import StopTexts
from moe_train.evaluate.generation.generator import Generator
from moe_train.evaluate.generation.sampling import Sampling
from moe_train.model.parameters import combine
from tests.evaluate.generation.test_completion import Letters
from tests.evaluate.tiny_generator import MIXTRAL, ONE, random_model


def test_rows_are_refilled_and_stop_texts_free_them() -> None:
    prompts = [[5 + n] for n in range(5)]
    with jax.set_mesh(ONE):
        generator = Generator(combine(*random_model(MIXTRAL)), MIXTRAL, ONE, max_rows=2)
        free = generator.generate(prompts, Sampling(12))
        stop = chr(free[1].tokens[4])
        stopped = generator.generate(prompts, Sampling(12), StopTexts(Letters(), (stop,)))  # type: ignore[arg-type]
        parts = list(generator.stream(prompts, ContinuationPlan(Sampling(12)), block_tokens=5))
    for one, two in zip(stopped, free, strict=True):
        text = Letters().decode(two.tokens)
        expected = two.tokens[: text.index(stop) + 1] if stop in text else two.tokens
        assert (one.tokens, one.stop) == (expected, "stop_text" if stop in text else "max_tokens")
        assert len(one.logprobs) == len(one.tokens)
    # The first token comes with the prompt, then blocks of five; two rows run at once.
    assert [len(part.tokens) for part in parts if part.request == 0] == [1, 5, 5, 1]
    assert {part.request for part in parts[:2]} == {0, 1}
    assert [part.request for part in parts if part.stop][-1] == 4


def test_weights_that_are_not_numbers_are_named() -> None:
    with jax.set_mesh(ONE):
        structure, weights = random_model(MIXTRAL)
        damaged = {**weights, "final_norm.scale": np.nan * weights["final_norm.scale"]}
        with pytest.raises(ValueError, match="no finite probabilities after 2 tokens of prompt 1"):
            Generator(combine(structure, damaged), MIXTRAL, ONE).generate([[1, 2]], Sampling(2))
