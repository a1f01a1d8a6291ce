"""Generate answers to prompts: the one place through which suites call the generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jax.sharding import Mesh
from jax.tree_util import PyTreeDef

from moe_train import config
from moe_train.data.chat.example import RenderedPrompt
from moe_train.data.media import media_of_piece
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.evaluate.generation.completion import StopTexts, decode_after
from moe_train.evaluate.generation.generator import Generator
from moe_train.evaluate.generation.sampling import Sampling
from moe_train.model.parameters import Parameters, combine


class LoadedModel(NamedTuple):
    """A model whose weights are on the mesh in force."""

    structure: PyTreeDef
    """The model without its weights."""
    weights: Parameters
    """All weights, adapters included."""
    model: config.Model
    """The architecture."""
    mesh: Mesh
    """The mesh."""
    cache_dtype: config.Dtype
    """Dtype of the key-value caches."""


class GeneratedText(NamedTuple):
    """What a model wrote after a prompt."""

    tokens: tuple[int, ...]
    """All new tokens, without the one that ended them; with the one in which a stop text ends."""
    text: str
    """Their text, up to the first stop text."""
    finished: bool
    """Whether it ended by itself or at a stop text, rather than after the most tokens that were allowed."""


class TextOptions(NamedTuple):
    """How prompts are continued, and how the result is written."""

    generation: config.AnswerGeneration
    batch_size: int
    """Largest number of prompts that are continued together."""
    keep_special: bool = False
    """Whether control tokens are written by name."""


def generate_answers(
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[RenderedPrompt],
    options: TextOptions,
    add_progress: Callable[[int], None],
) -> list[GeneratedText]:
    """Continue each prompt; the results are in the order of the prompts.

    Args:
        loaded: The model.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        options: How they are continued.
        add_progress: Called with the number of prompts that were completed.
    """
    generation = options.generation
    sampling = Sampling(generation.max_tokens, tuple(tokenizer.end_ids), generation.temperature, seed=generation.seed)
    stops = StopTexts(tokenizer, generation.stop)
    transformer = combine(loaded.structure, loaded.weights)
    generator = Generator(transformer, loaded.model, loaded.mesh, loaded.cache_dtype, options.batch_size)
    media = [media_of_piece(prompt.media, tokenizer.media) for prompt in prompts]
    completions = generator.generate([prompt.tokens for prompt in prompts], sampling, stops, media=media)
    texts = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = stops.before_stop(decode_after(tokenizer, prompt.tokens, completion.tokens, keep_special=options.keep_special))
        texts.append(GeneratedText(tuple(completion.tokens), text, completion.stop != "max_tokens"))
    add_progress(len(texts))
    return texts
