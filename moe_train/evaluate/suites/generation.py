"""Generate answers to prompts: the one place through which suites call the generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jax.sharding import Mesh
from jax.tree_util import PyTreeDef

from moe_train import config
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.evaluate.generate import GenerationOptions, generate_tokens
from moe_train.model.parameters import Parameters


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
    """All new tokens, without the one that ended them."""
    text: str
    """Their text, up to the first stop text."""
    finished: bool
    """Whether it ended by itself or at a stop text, rather than after the most tokens that were allowed."""


class TextOptions(NamedTuple):
    """How prompts are continued, and how the result is written."""

    generation: config.AnswerGeneration
    batch_size: int
    """Number of prompts that are continued together."""
    keep_special: bool = False
    """Whether control tokens are written by name."""


def generate_answers(
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    options: TextOptions,
    add_progress: Callable[[int], None],
) -> list[GeneratedText]:
    """Continue each prompt; the results are in the order of the prompts.

    Args:
        loaded: The model.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt.
        options: How they are continued.
        add_progress: Called with the number of prompts that were completed.
    """
    generation = options.generation
    generated: dict[int, list[int]] = {}
    # Prompts of similar length share a batch, whose caches are as long as its longest prompt needs.
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(by_length), options.batch_size):
        rows = by_length[start : start + options.batch_size]
        settings = GenerationOptions(
            generation.max_tokens, tuple(tokenizer.end_ids), generation.temperature, generation.seed, loaded.cache_dtype
        )
        batch = [prompts[i] for i in rows]
        new = generate_tokens(loaded.structure, loaded.weights, loaded.model, loaded.mesh, batch, settings)
        generated |= dict(zip(rows, new, strict=True))
        add_progress(len(rows))
    texts = []
    for i, prompt in enumerate(prompts):
        text = decode_after(tokenizer, prompt, generated[i], options.keep_special)
        before_stop, is_stopped = _before_stop(text, generation.stop)
        finished = is_stopped or len(generated[i]) < generation.max_tokens
        texts.append(GeneratedText(tuple(generated[i]), before_stop, finished))
    return texts


def decode_after(tokenizer: Tokenizer, before: Sequence[int], after: Sequence[int], keep_special: bool) -> str:
    """Decode `after` in the context of `before`, since some tokenizers drop the first space of a text."""
    prefix = tokenizer.decode(list(before), keep_special=keep_special)
    full_text = tokenizer.decode([*before, *after], keep_special=keep_special)
    if full_text.startswith(prefix):
        return full_text[len(prefix) :]
    return tokenizer.decode(list(after), keep_special=keep_special)


def _before_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Return a text up to the first stop text, and whether it has one."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return (text[: min(ends)], True) if ends else (text, False)
