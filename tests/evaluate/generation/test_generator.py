"""Generation against the forward pass without a cache, one sequence at a time."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.evaluate.generation import batch, programs
from moe_train.evaluate.generation.generator import Generator, check_lengths
from moe_train.evaluate.generation.sampling import Sampling
from moe_train.machine.mesh import put_batch
from moe_train.model.parameters import Parameters, combine
from tests.evaluate.tiny_generator import ATTENTION, MIXTRAL, ONE, SIZES, random_model
from tests.meshes import mesh_of

DENSE = config.DenseFfn(name="dense", ffn_dim=16)
MINISTRAL = config.Model(family="ministral", attention=ATTENTION.model_copy(update={"windows": (None, 7)}), ffn=DENSE, **SIZES)
SCALING = config.QueryScaling(beta=0.1, original_max_seq_len=16)
YARN = config.YarnRope(name="yarn", factor=4.0, original_max_seq_len=16)
MINISTRAL3 = config.Model(
    family="ministral3", attention=ATTENTION.model_copy(update={"query_scaling": SCALING}), ffn=DENSE, rope=YARN, **SIZES
)
PROMPTS = [list(np.random.default_rng(n).integers(0, 300, n)) for n in (5, 70, 1, 64)]
EIGHT = mesh_of(config.Mesh(expert=2, context=2, tensor=2))


def plainly(
    structure: Any, weights: Parameters, mesh: jax.sharding.Mesh, prompt: list[int], count: int
) -> tuple[list[int], float, list[float]]:
    """Greedy tokens by reading everything anew each time, the least lead that a chosen token had, and log-probabilities."""
    tokens, lead, logprobs = list(prompt), np.inf, []

    @jax.jit
    def run(weights: Parameters, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        module = combine(structure, weights)
        return module.logits(module(tokens, positions, segments)[0])

    for _ in range(count):
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(tokens)] = tokens
        segments = (np.arange(128)[None] < len(tokens)).astype(np.int32)
        logits = np.asarray(run(weights, *put_batch((padded, np.arange(128, dtype=np.int32)[None], segments), mesh)))[
            0, len(tokens) - 1
        ]
        second, first = np.sort(logits)[-2:]
        lead = min(lead, first - second)
        tokens.append(int(np.argmax(logits)))
        logprobs.append(float(np.max(jax.nn.log_softmax(logits))))
    return tokens[len(prompt) :], float(lead), logprobs


def generator(model: config.Model, mesh: jax.sharding.Mesh = ONE, max_rows: int = 32) -> Generator:
    return Generator(combine(*random_model(model)), model, mesh, max_rows=max_rows)


@pytest.mark.parametrize("model", [MIXTRAL, MINISTRAL, MINISTRAL3], ids=lambda m: m.family)
def test_a_batch_with_a_cache_continues_each_prompt_as_without_one(model: config.Model) -> None:
    """With fewer rows than prompts, so that a row serves several of them; log-probabilities are those of the whole sequence."""
    with jax.set_mesh(ONE):
        structure, weights = random_model(model)
        together = generator(model, max_rows=2).generate(PROMPTS, Sampling(10))
        for prompt, completion in zip(PROMPTS, together, strict=True):
            alone, lead, logprobs = plainly(structure, weights, ONE, prompt, 10)
            assert lead > 1e-4, "a tie: choose other weights"
            assert completion.tokens == alone
            assert completion.stop == "max_tokens"
            np.testing.assert_allclose(completion.logprobs, logprobs, rtol=1e-4)


def test_a_mesh_of_eight_draws_the_same_tokens_as_one_device_in_any_order_and_batch() -> None:
    sampling = Sampling(6, temperature=1.0, top_k=100, top_p=0.9, repetition_penalty=1.2, seed=2**40 + 1)
    with jax.set_mesh(ONE):
        expected = generator(MIXTRAL).generate(PROMPTS[:3], sampling)
        backwards = generator(MIXTRAL, max_rows=1).generate(PROMPTS[2::-1], sampling, indices=[2, 1, 0])
    with jax.set_mesh(EIGHT):
        sharded = generator(MIXTRAL, EIGHT).generate(PROMPTS[:3], sampling)
    for other in (backwards[::-1], sharded):
        assert [completion.tokens for completion in other] == [completion.tokens for completion in expected]
        for one, two in zip(other, expected, strict=True):
            np.testing.assert_allclose(one.logprobs, two.logprobs, rtol=1e-4)


def test_the_cache_of_a_single_sequence_is_not_copied_for_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy takes longer than attention itself: 5 ms a token for four layers of 2048 slots, where 0.4 ms are needed."""
    texts: list[str] = []

    def recorded(*arguments: Any, **options: Any) -> Any:
        texts.append(programs.generate_block.lower(*arguments, **options).compile().as_text())
        return programs.generate_block(*arguments, **options)

    monkeypatch.setattr(batch, "generate_block", recorded)
    with jax.set_mesh(ONE):
        generator(MIXTRAL, max_rows=1).generate(PROMPTS[:1], Sampling(3))
    cache = r"f32\[(?:1,)*2,(?:8,(\d{2,})|(\d{2,}),8)\]"
    assert re.search(cache, texts[0]), "the pattern finds no cache"
    assert not re.search(cache + r"\S* copy\(", texts[0])


def test_an_end_token_ends_one_sequence_and_not_the_others() -> None:
    with jax.set_mesh(ONE):
        mixtral = generator(MIXTRAL)
        free = [completion.tokens for completion in mixtral.generate(PROMPTS, Sampling(8))]
        end = free[0][3]
        ended = mixtral.generate(PROMPTS, Sampling(8, end_ids=(end,)))
    assert [completion.tokens for completion in ended] == [new[: new.index(end)] if end in new else new for new in free]
    assert [completion.stop for completion in ended] == ["end_token" if end in new else "max_tokens" for new in free]
    assert len(ended[0].tokens) <= 3 < 8 in [len(completion.tokens) for completion in ended]


@pytest.mark.slow
def test_draws_depend_on_the_seed() -> None:
    with jax.set_mesh(ONE):
        mixtral = generator(MIXTRAL)

        def draw(temperature: float, seed: int) -> list[list[int]]:
            sampling = Sampling(12, temperature=temperature, seed=seed)
            return [completion.tokens for completion in mixtral.generate(PROMPTS[:2], sampling)]

        assert draw(1.0, 1) == draw(1.0, 1) != draw(1.0, 2) != draw(1.0, 2 + 2**32)
        assert draw(1e-4, 1) == draw(0.0, 1)


def test_prompts_that_cannot_be_continued_are_refused() -> None:
    with pytest.raises(ValueError, match="exceeds the model's max_seq_len 256"):
        check_lengths(PROMPTS, 200, MIXTRAL)
    with pytest.raises(ValueError, match="prompt 2 has no tokens"):
        check_lengths([[1], []], 2, MIXTRAL)
