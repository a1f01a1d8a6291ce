"""Log-likelihood of texts after a prompt, by which multiple choice is graded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.tree_util import PyTreeDef

from moe_train.machine.mesh import BATCH, put_equal
from moe_train.model.parameters import Parameters, combine
from moe_train.train.token_logprobs import token_logprobs


class Continuation(NamedTuple):
    """A prompt and what is to follow it, as tokens."""

    prompt: Sequence[int]
    """At least one token."""
    text: Sequence[int]
    """Tokens of the continuation."""


class Scored(NamedTuple):
    """The likelihood of a continuation."""

    log_likelihood: float
    """log p(text | prompt) in nats."""
    is_greedy: bool
    """Whether each of its tokens is the most likely one."""


def log_likelihoods(
    structure: PyTreeDef, weights: Parameters, mesh: Mesh, continuations: Sequence[Continuation], batch_size: int
) -> list[float]:
    """Compute log p(text | prompt) in nats for each continuation.

    They are sorted by length and padded to a power of two, so that few shapes are compiled and little is padding.

    Args:
        structure: The model without its weights.
        weights: All weights, adapters included.
        mesh: The mesh, which has to be in force.
        continuations: The prompts and texts.
        batch_size: Number of rows of a batch; rounded up to a multiple of the devices that split it.
    """
    batch_size += -batch_size % math.prod(mesh.shape[axis] for axis in BATCH)
    totals = [0.0] * len(continuations)
    for rows in _rows_by_length(continuations, batch_size):
        batch, is_text = _batch([continuations[i] for i in rows], batch_size, mesh)
        logprobs = np.asarray(_logprobs(structure, weights, *_put(batch, mesh)), np.float64)
        for row, index in enumerate(rows):
            totals[index] = float(logprobs[row] @ is_text[row])
    return totals


def scored_continuations(
    structure: PyTreeDef, weights: Parameters, mesh: Mesh, continuations: Sequence[Continuation], batch_size: int
) -> list[Scored]:
    """Compute `log_likelihoods`, and whether each continuation is the greedy one; the arguments are the same.

    The logits of all positions of a batch are computed, which takes much more memory.
    """
    batch_size += -batch_size % math.prod(mesh.shape[axis] for axis in BATCH)
    scored = [Scored(0.0, False)] * len(continuations)
    for rows in _rows_by_length(continuations, batch_size):
        batch, is_text = _batch([continuations[i] for i in rows], batch_size, mesh)
        logprobs, is_best = jax.device_get(_logprobs_and_best(structure, weights, *_put(batch, mesh)))
        for row, index in enumerate(rows):
            total = float(np.asarray(logprobs[row], np.float64) @ is_text[row])
            scored[index] = Scored(total, bool(is_best[row][is_text[row]].all()))
    return scored


def _rows_by_length(continuations: Sequence[Continuation], batch_size: int) -> list[list[int]]:
    """Return the continuations of each batch by their index; those of similar length share a batch."""
    by_length = sorted(range(len(continuations)), key=lambda i: len(continuations[i].prompt) + len(continuations[i].text))
    return [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]


def _batch(
    continuations: Sequence[Continuation], rows: int, mesh: Mesh
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Return (tokens, positions, segment ids, targets) of shape (B, T), and which targets belong to a text."""
    # The last token of a text is only a target.
    longest = max(len(prompt) + len(text) - 1 for prompt, text in continuations)
    T = max(64, 2 ** math.ceil(math.log2(longest)))
    T += -T % mesh.shape["context"]
    tokens = np.zeros((rows, T), np.int32)
    targets = np.zeros((rows, T), np.int32)
    segment_ids = np.zeros((rows, T), np.int32)
    is_text = np.zeros((rows, T), bool)
    for row, (prompt, text) in enumerate(continuations):
        sequence = np.array([*prompt, *text], np.int32)
        length = len(sequence) - 1
        tokens[row, :length] = sequence[:-1]
        targets[row, :length] = sequence[1:]
        segment_ids[row, :length] = 1
        is_text[row, len(prompt) - 1 : length] = True
    positions = np.tile(np.arange(T, dtype=np.int32), (rows, 1))
    return (tokens, positions, segment_ids, targets), is_text


def _put(batch: tuple[np.ndarray, ...], mesh: Mesh) -> tuple[jax.Array, ...]:
    """Return the arrays of a batch, which all processes have, on the mesh."""
    return put_equal(batch, mesh, P(BATCH, "context"))


@partial(jax.jit, static_argnums=0)
def _logprobs(
    structure: PyTreeDef, weights: Parameters, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, targets: jax.Array
) -> jax.Array:
    """Return the log-probability of each target (B, T)."""
    model = combine(structure, weights)
    hidden, _ = model(tokens, positions, segment_ids)
    logprob = token_logprobs(hidden, model.head_weight(), targets, model.head_lora_factors(hidden)).logprob
    return _replicated(logprob)


@partial(jax.jit, static_argnums=0)
def _logprobs_and_best(
    structure: PyTreeDef, weights: Parameters, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the log-probability of each target (B, T), and whether no other token has a larger logit."""
    model = combine(structure, weights)
    hidden, _ = model(tokens, positions, segment_ids)
    logprob = token_logprobs(hidden, model.head_weight(), targets, model.head_lora_factors(hidden)).logprob
    logits = model.logits(hidden)
    # A comparison and not an index, since the vocabulary may be split over devices.
    is_target = targets[..., None] == jnp.arange(logits.shape[-1])
    is_best = jnp.max(jnp.where(is_target, logits, -jnp.inf), axis=-1) >= jnp.max(logits, axis=-1)
    return _replicated(logprob), _replicated(is_best)


def _replicated(x: jax.Array) -> jax.Array:
    """Return an array that every process can read."""
    return jax.sharding.reshard(x, P())
