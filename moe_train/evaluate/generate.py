"""Generation in a single call, for a model whose weights are a flat dict; `generation.generator` is the full interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh
from jax.tree_util import PyTreeDef

from moe_train import config
from moe_train.evaluate.generation.completion import decode_after
from moe_train.evaluate.generation.generator import Generator, check_lengths
from moe_train.evaluate.generation.sampling import Sampling
from moe_train.model.parameters import Parameters, combine

__all__ = ["GenerationOptions", "check_lengths", "decode_after", "generate_tokens"]


class GenerationOptions(NamedTuple):
    """How prompts are continued."""

    max_tokens: int
    """Maximum number of new tokens per prompt."""
    end_ids: tuple[int, ...] = ()
    """The tokens that end a continuation; empty to generate `max_tokens` tokens always."""
    temperature: float = 0.0
    """0 selects the most likely token; above 0, tokens are sampled from softmax(logits / temperature)."""
    seed: int = 0
    """Seed of the sampling. A sample depends only on the seed, the prompt's index and the position."""
    cache_dtype: config.Dtype = "float32"
    """Dtype of the key-value caches."""


def generate_tokens(
    structure: PyTreeDef,
    weights: Parameters,
    model: config.Model,
    mesh: Mesh,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
) -> list[list[int]]:
    """Generate tokens for each prompt.

    Args:
        structure: The model without its weights.
        weights: All weights, adapters included.
        model: The architecture.
        mesh: The mesh, which has to be in force.
        prompts: Token ids of each prompt.
        options: How the prompts are continued.

    Returns:
        The new tokens of each prompt, without the token that ended it.

    Raises:
        ValueError: If a prompt is empty or too long (see `check_lengths`).
    """
    generator = Generator(combine(structure, weights), model, mesh, options.cache_dtype)
    sampling = Sampling(options.max_tokens, options.end_ids, options.temperature, seed=options.seed)
    return [completion.tokens for completion in generator.generate(prompts, sampling)]
