"""Text generation on the device, with key-value caches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_train import config
from moe_train.machine.mesh import BATCH, put_batch
from moe_train.model.parameters import Parameters, combine
from moe_train.model.transformer import empty_caches

CHUNK = 64
"""Number of prompt tokens that one prefill step processes."""


def check_lengths(prompts: Sequence[Sequence[int]], max_tokens: int, model: config.Model) -> None:
    """Check that every prompt can be continued.

    Args:
        prompts: Token ids of each prompt.
        max_tokens: Number of tokens to generate.
        model: The architecture, whose max_seq_len is the limit.

    Raises:
        ValueError: If a prompt has no tokens, or no room for `max_tokens` more.
    """
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i + 1} has no tokens, and the tokenizer has no token that begins a text; write something")
        if len(prompt) + max_tokens > model.max_seq_len:
            raise ValueError(
                f"prompt {i + 1} has {len(prompt)} tokens; with {max_tokens} more it exceeds the model's max_seq_len "
                f"{model.max_seq_len}"
            )


def generate(
    structure: Any,
    weights: Parameters,
    model: config.Model,
    mesh: Mesh,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    eos_id: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: config.Dtype = "float32",
) -> list[list[int]]:
    """Generate tokens for each prompt; all prompts run as one batch.

    Args:
        structure: The model without its weights.
        weights: All weights, adapters included.
        model: The architecture.
        mesh: The mesh, which has to be in force.
        prompts: Token ids of each prompt.
        max_tokens: Largest number of new tokens per prompt.
        eos_id: The token that ends a continuation, or several of them; None to generate `max_tokens` tokens always.
        temperature: 0 selects the most likely token; above 0, tokens are sampled, and a sample depends only on the seed, the
            prompt's index and the position.
        seed: Seed of the sampling.
        dtype: Dtype of the key-value cache.

    Returns:
        The new tokens of each prompt, without the final `eos_id`.

    Raises:
        ValueError: If a prompt is empty or too long (see `check_lengths`).
    """
    check_lengths(prompts, max_tokens, model)
    # Rows are padded to a multiple of the devices that split the batch; padding rows have length 0.
    rows = len(prompts) + -len(prompts) % math.prod(mesh.shape[axis] for axis in BATCH)
    lengths = np.array([len(prompt) for prompt in prompts] + [0] * (rows - len(prompts)))
    longest = int(lengths.max())
    # Powers of two keep the number of distinct cache shapes, and so of compilations, small.
    room = max(CHUNK, 2 ** math.ceil(math.log2(longest + max_tokens)))
    room += -room % mesh.shape["context"]

    def read(tokens: np.ndarray, positions: np.ndarray, caches: Any) -> tuple[np.ndarray, Any]:
        """Run a step on padded tokens; padding has position -1."""
        padding = ((0, 0), (0, -tokens.shape[1] % mesh.shape["context"]))
        padded = np.pad(tokens, padding).astype(np.int32), np.pad(positions, padding, constant_values=-1).astype(np.int32)
        logits, caches = _step(structure, weights, *put_batch(padded, mesh), caches)
        return np.asarray(logits), caches

    caches = empty_caches(model, rows, room, jnp.dtype(dtype))
    last = np.zeros((rows, model.vocab_size), np.float32)
    for start in range(0, longest, CHUNK):
        tokens, positions = np.zeros((rows, CHUNK), int), np.arange(start, start + CHUNK) + np.zeros((rows, 1), int)
        for row, prompt in enumerate(prompts):
            part = prompt[start : start + CHUNK]
            tokens[row, : len(part)] = part
        logits, caches = read(tokens, np.where(positions < lengths[:, None], positions, -1), caches)
        # Prompts end in different chunks; keep the logits of each prompt's last token.
        ended = np.flatnonzero((lengths > start) & (lengths <= start + CHUNK))
        last[ended] = logits[ended, lengths[ended] - 1 - start]

    ends = [] if eos_id is None else eos_id
    new: list[list[int]] = [[] for _ in prompts]
    running = np.arange(rows) < len(prompts)
    for i in range(max_tokens):
        chosen = np.array([_choose(last[row], temperature, (seed, row, i)) for row in range(rows)])
        running &= ~np.isin(chosen, ends)
        for row in np.flatnonzero(running):
            new[row].append(int(chosen[row]))
        if i + 1 == max_tokens or not running.any():
            break
        logits, caches = read(chosen[:, None], np.where(running, lengths + i, -1)[:, None], caches)
        last = logits[:, 0]
    return new


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _step(structure: Any, weights: Parameters, tokens: jax.Array, positions: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
    """Run one forward pass with the caches, which are donated."""
    return combine(structure, weights).decode(tokens, positions, caches)


def _choose(logits: np.ndarray, temperature: float, key: tuple[int, ...]) -> int:
    """Return the most likely token, or a sample from softmax(logits / temperature) by the Gumbel-max trick."""
    if temperature == 0:
        return int(np.argmax(logits))
    return int(np.argmax(logits / temperature + np.random.default_rng(key).gumbel(size=logits.shape)))
