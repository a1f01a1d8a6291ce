"""Generation against the forward pass without a cache, one sequence at a time."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.evaluate.generate import GenerationOptions, _choose, generate_tokens
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


def plainly(structure: Any, weights: Parameters, mesh: jax.sharding.Mesh, prompt: list[int], count: int) -> tuple[list[int], float]:
    """Greedy tokens by reading everything anew each time, and the least lead that a chosen token had."""
    tokens, lead = list(prompt), np.inf

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
    return tokens[len(prompt) :], float(lead)


@pytest.mark.parametrize("model", [MIXTRAL, MINISTRAL, MINISTRAL3], ids=lambda m: m.family)
def test_a_batch_with_a_cache_says_what_each_prompt_says_alone(model: config.Model) -> None:
    with jax.set_mesh(ONE):
        structure, weights = random_model(model)
        together = generate_tokens(structure, weights, model, ONE, PROMPTS, GenerationOptions(10))
        for prompt, new in zip(PROMPTS, together, strict=True):
            alone, lead = plainly(structure, weights, ONE, prompt, 10)
            assert lead > 1e-4, "a tie: choose other weights"
            assert new == alone


def test_a_mesh_of_eight_says_the_same_as_one_device() -> None:
    answers = []
    for mesh in (ONE, EIGHT):
        with jax.set_mesh(mesh):
            answers.append(generate_tokens(*random_model(MIXTRAL), MIXTRAL, mesh, PROMPTS[:3], GenerationOptions(6)))
    assert answers[0] == answers[1]


def test_eos_ends_one_sequence_and_not_the_others() -> None:
    with jax.set_mesh(ONE):
        structure, weights = random_model(MIXTRAL)
        free = generate_tokens(structure, weights, MIXTRAL, ONE, PROMPTS, GenerationOptions(8))
        eos = free[0][3]
        ended = generate_tokens(structure, weights, MIXTRAL, ONE, PROMPTS, GenerationOptions(8, end_ids=(eos,)))
    assert ended == [new[: new.index(eos)] if eos in new else new for new in free]
    assert len(ended[0]) <= 3 < 8 in map(len, ended)


def test_draws_depend_on_the_seed_alone() -> None:
    with jax.set_mesh(ONE):
        structure, weights = random_model(MIXTRAL)

        def draw(temperature: float, seed: int) -> list[list[int]]:
            return generate_tokens(
                structure, weights, MIXTRAL, ONE, PROMPTS[:2], GenerationOptions(12, temperature=temperature, seed=seed)
            )

        assert draw(1.0, 1) == draw(1.0, 1) != draw(1.0, 2)
        assert draw(1e-4, 1) == draw(0.0, 1)
        with pytest.raises(ValueError, match="exceeds the model's max_seq_len 256"):
            generate_tokens(structure, weights, MIXTRAL, ONE, PROMPTS, GenerationOptions(200))
        with pytest.raises(ValueError, match="prompt 2 has no tokens"):
            generate_tokens(structure, weights, MIXTRAL, ONE, [[1], []], GenerationOptions(2))


def test_drawn_tokens_have_the_softmax_frequencies() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05])) * 2.0
    counts = np.bincount([_choose(logits, 2.0, (0, 0, i)) for i in range(4000)], minlength=4) / 4000
    assert np.abs(counts - [0.5, 0.3, 0.15, 0.05]).max() < 0.03
