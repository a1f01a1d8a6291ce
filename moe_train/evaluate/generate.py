"""Text generation on the device, with key-value caches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import PyTreeDef

from moe_train import config
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.mesh import BATCH, put_batch
from moe_train.model.parameters import Parameters, combine
from moe_train.model.transformer import empty_caches

PREFILL_TOKENS = 64
"""Number of prompt tokens that one prefill step processes."""


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


def check_lengths(prompts: Sequence[Sequence[int]], max_tokens: int, model: config.Model) -> None:
    """Check that every prompt can be continued.

    Args:
        prompts: Token ids of each prompt.
        max_tokens: Number of tokens to generate.
        model: The architecture, whose max_seq_len is the limit.

    Raises:
        ValueError: If a prompt has no tokens, or if `max_tokens` more would exceed the limit.
    """
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(
                f"prompt {i + 1} has no tokens, and the tokenizer adds none at the beginning of a text; the prompt needs at least "
                "one token, so write some text"
            )
        if len(prompt) + max_tokens > model.max_seq_len:
            raise ValueError(
                f"prompt {i + 1} has {len(prompt)} tokens; with {max_tokens} new ones it exceeds the model's max_seq_len "
                f"{model.max_seq_len}; shorten the prompt or generate fewer tokens"
            )


def generate_tokens(
    structure: PyTreeDef,
    weights: Parameters,
    model: config.Model,
    mesh: Mesh,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
) -> list[list[int]]:
    """Generate tokens for each prompt; all prompts run as one batch.

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
    check_lengths(prompts, options.max_tokens, model)
    # Rows are padded to a multiple of the devices that split the batch; padding rows have length 0.
    rows = len(prompts) + -len(prompts) % math.prod(mesh.shape[axis] for axis in BATCH)
    lengths = np.array([len(prompt) for prompt in prompts] + [0] * (rows - len(prompts)))
    cache_length = _cache_length(int(lengths.max()) + options.max_tokens, mesh)
    decoder = _Decoder(structure, weights, mesh, empty_caches(model, rows, cache_length, jnp.dtype(options.cache_dtype)))
    last_logits = _prefill(decoder, prompts, lengths, model.vocab_size)

    continuations: list[list[int]] = [[] for _ in prompts]
    running = np.arange(rows) < len(prompts)
    for i in range(options.max_tokens):
        chosen = np.array([_choose(last_logits[row], options.temperature, (options.seed, row, i)) for row in range(rows)])
        running &= ~np.isin(chosen, options.end_ids)
        for row in np.flatnonzero(running):
            continuations[row].append(int(chosen[row]))
        if i + 1 == options.max_tokens or not running.any():
            break
        # Ended sequences stay in the batch as padding, since its shape is compiled.
        positions = np.where(running, lengths + i, -1)
        last_logits = decoder.step(chosen[:, None], positions[:, None])[:, 0]
    return continuations


def _cache_length(tokens: int, mesh: Mesh) -> int:
    """Return the length of caches for sequences of `tokens` tokens, a multiple of the devices along `context`."""
    # Powers of two keep the number of distinct cache shapes, and so of compilations, small.
    length = max(PREFILL_TOKENS, 2 ** math.ceil(math.log2(tokens)))
    return length + -length % mesh.shape["context"]


class _Decoder:
    """A model with the caches of the sequences of one batch."""

    def __init__(self, structure: PyTreeDef, weights: Parameters, mesh: Mesh, caches: Any) -> None:
        self._structure = structure
        self._weights = weights
        self._mesh = mesh
        self._caches = caches

    def step(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Run (B, T) further tokens at their positions (-1 on padding), extend the caches and return the logits (B, T, V)."""
        # `context` splits the tokens of a step, even a single one, so their number is padded to a multiple of its devices.
        padding = ((0, 0), (0, -tokens.shape[1] % self._mesh.shape["context"]))
        padded_tokens = np.pad(tokens, padding).astype(np.int32)
        padded_positions = np.pad(positions, padding, constant_values=-1).astype(np.int32)
        batch = put_batch((padded_tokens, padded_positions), self._mesh)
        logits, self._caches = _step(self._structure, self._weights, *batch, self._caches)
        return np.asarray(logits)


def _prefill(decoder: _Decoder, prompts: Sequence[Sequence[int]], lengths: np.ndarray, vocab_size: int) -> np.ndarray:
    """Run all prompts through the decoder and return the logits (B, V) of each prompt's last token."""
    rows = len(lengths)
    last_logits = np.zeros((rows, vocab_size), np.float32)
    for start in range(0, int(lengths.max()), PREFILL_TOKENS):
        stop = start + PREFILL_TOKENS
        tokens = np.zeros((rows, PREFILL_TOKENS), int)
        for row, prompt in enumerate(prompts):
            chunk = prompt[start:stop]
            tokens[row, : len(chunk)] = chunk
        positions = np.tile(np.arange(start, stop), (rows, 1))
        logits = decoder.step(tokens, np.where(positions < lengths[:, None], positions, -1))
        # Prompts end in different chunks; keep the logits of each prompt's last token.
        ending = np.flatnonzero((lengths > start) & (lengths <= stop))
        last_logits[ending] = logits[ending, lengths[ending] - 1 - start]
    return last_logits


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _step(structure: PyTreeDef, weights: Parameters, tokens: jax.Array, positions: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
    """Run one forward pass with the caches, which are donated."""
    return combine(structure, weights).decode(tokens, positions, caches)


def _choose(logits: np.ndarray, temperature: float, key: tuple[int, ...]) -> int:
    """Return the most likely token, or a sample from softmax(logits / temperature) by the Gumbel-max trick."""
    if temperature == 0:
        return int(np.argmax(logits))
    noise = np.random.default_rng(key).gumbel(size=logits.shape)
    return int(np.argmax(logits / temperature + noise))


def decode_after(tokenizer: Tokenizer, before: Sequence[int], after: Sequence[int]) -> str:
    """Decode `after` in the context of `before`, since some tokenizers drop the first space of a text."""
    prefix = tokenizer.decode(list(before))
    full_text = tokenizer.decode([*before, *after])
    if full_text.startswith(prefix):
        return full_text[len(prefix) :]
    return tokenizer.decode(list(after))
