"""A batch of sequences on the device, whose rows are given to waiting prompts as soon as enough of them have ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.data.media import MediaOfPiece
from moe_train.evaluate.generation.completion import Progress, StopReason, StopTexts
from moe_train.evaluate.generation.json_schema import JsonSchema
from moe_train.evaluate.generation.media import arranged_media
from moe_train.evaluate.generation.programs import (
    Block,
    Choice,
    Prompts,
    Rows,
    empty_memory,
    first_tokens,
    generate_block,
    media_features,
    read_prompts,
)
from moe_train.evaluate.generation.sampling import Sampling, sampling_kind, sampling_values
from moe_train.machine.mesh import BATCH, put_equal
from moe_train.model.encoders.media import Media
from moe_train.model.transformer import Transformer

PROMPT_TOKENS = 64
"""Number of tokens of each prompt that are read at once."""


class Request(NamedTuple):
    """A prompt to continue."""

    number: int
    """Index in the caller's list."""
    draw_index: int
    """Index on which its draws depend."""
    prompt: list[int]
    media: MediaOfPiece | None = None
    """The pictures, or the sound, of the prompt; None if it has none."""


class ContinuationPlan(NamedTuple):
    """How the prompts of a batch are continued."""

    sampling: Sampling
    stop_texts: StopTexts | None = None
    """Texts that end a continuation; None for none."""
    schema: JsonSchema | None = None
    """JSON schema that the continuations fit; None for any text. Blocks have a single token then."""


class ShownMedia(NamedTuple):
    """Pictures or sound of prompts, as the model sees or hears them."""

    features_BMD: jax.Array
    feature_index: np.ndarray
    """(B, T) index of the feature of each token of the prompts; -1 for others."""


class _Sequence:
    """A request in a row, with what has been generated for it."""

    def __init__(self, request: Request, schema: JsonSchema | None) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.schema_state = None if schema is None else schema.begin()


class Batch:
    """Sequences of one group of requests.

    Args:
        transformer: the model.
        mesh: the mesh, which has to be in force.
        plan: how prompts are continued.
    """

    def __init__(self, transformer: Transformer, mesh: Mesh, plan: ContinuationPlan) -> None:
        self._transformer = transformer
        self._mesh = mesh
        self._plan = plan
        sampling = plan.sampling
        self._kind = sampling_kind(sampling)
        self._values = sampling_values(sampling)
        # -1 is no token: a program takes at least one.
        self._end_ids = np.array(sampling.end_ids or (-1,), np.int32)

    def allocate(self, model: config.Model, rows: int, slots: int, dtype: jnp.dtype) -> None:
        """Create empty caches on the device for `rows` sequences of at most `slots` tokens."""
        self._memory = empty_memory(
            self._transformer, model=model, rows=rows, slots=slots, dtype=dtype, keeps_tokens=self._kind.penalizes
        )
        self._vocab_size = model.vocab_size
        self._sequences: list[_Sequence | None] = [None] * rows
        # The programs take NumPy arrays in the place of JAX arrays.
        zeros: list[Any] = [np.zeros(rows, np.int32) for _ in Rows._fields]
        self._rows = Rows(*zeros)

    def run(self, requests: Sequence[Request], block_tokens: int) -> Iterator[Progress]:
        """Continue the requests, and yield what is generated after each block."""
        waiting = deque(requests)
        while True:
            free = [row for row, sequence in enumerate(self._sequences) if sequence is None]
            # Reading prompts costs as much for one row as for all, so rows are refilled a quarter of the batch at a time.
            if waiting and len(free) >= max(1, len(self._sequences) // 4):
                admitted = free[: len(waiting)]
                for row in admitted:
                    self._sequences[row] = _Sequence(waiting.popleft(), self._plan.schema)
                yield from self._start(admitted)
            if all(sequence is None for sequence in self._sequences):
                if not waiting:
                    return
                continue
            # The mask of a token depends on the one before it, so that blocks with a schema have one token.
            limits = (np.int32(block_tokens if self._plan.schema is None else 1), self._end_ids)
            self._memory, block = generate_block(
                self._transformer,
                self._memory,
                self._put(self._rows),
                limits,
                self._choice(),
                kind=self._kind,
            )
            yield from self._collect(block)

    def _start(self, admitted: Sequence[int]) -> Iterator[Progress]:
        """Read the prompts of new sequences, and choose the first token of each."""
        B = len(self._sequences)
        lengths = np.zeros(B, np.int32)
        tokens = np.zeros((B, 0), np.int32)
        for row in admitted:
            sequence = self._sequences[row]
            assert sequence is not None
            prompt = sequence.request.prompt
            lengths[row] = len(prompt)
            if len(prompt) > tokens.shape[1]:
                tokens = np.pad(tokens, ((0, 0), (0, len(prompt) - tokens.shape[1])))
            tokens[row, : len(prompt)] = prompt
            self._rows.tokens_B[row] = 0
            self._rows.positions_B[row] = len(prompt)
            self._rows.requests_B[row] = sequence.request.draw_index
            self._rows.remaining_B[row] = self._plan.sampling.max_tokens
        self._read(tokens, lengths, self._shown(admitted, tokens.shape))
        block = first_tokens(self._transformer, self._memory, self._put(self._rows), self._choice(), kind=self._kind)
        # Only the new rows have a first token; the others wait.
        is_new_B = lengths > 0
        tokens_NB: Any = np.where(is_new_B, block.tokens_NB, -1)
        first = block._replace(tokens_NB=tokens_NB)
        # A block counts positions from the token before.
        self._rows.positions_B[is_new_B] -= 1
        yield from self._collect(first)

    def _shown(self, admitted: Sequence[int], shape: tuple[int, ...]) -> ShownMedia | None:
        """Compute the features of the pictures or the sound of new sequences, whose prompts have `shape` (B, T), if any."""
        requests: dict[int, Request] = {}
        for row in admitted:
            sequence = self._sequences[row]
            assert sequence is not None
            if sequence.request.media is not None:
                requests[row] = sequence.request
        if not requests:
            return None
        arranged = arranged_media(requests, shape, self._mesh.shape["context"])
        media = Media(*put_equal(tuple(arranged.media), self._mesh, P(BATCH, "context")))
        return ShownMedia(media_features(self._transformer, media), arranged.feature_index)

    def _read(self, tokens: np.ndarray, lengths: np.ndarray, shown: ShownMedia | None) -> None:
        """Read the prompts (B, T) of some lengths (B,), 0 for rows that read none, part by part."""
        columns = PROMPT_TOKENS + -PROMPT_TOKENS % self._mesh.shape["context"]
        padding = ((0, 0), (0, -tokens.shape[1] % columns))
        tokens = np.pad(tokens, padding)
        index = None if shown is None else np.pad(shown.feature_index, padding, constant_values=-1)
        for start in range(0, tokens.shape[1], columns):
            positions = np.tile(np.arange(start, start + columns, dtype=np.int32), (len(lengths), 1))
            last = lengths - 1 - start
            parts: tuple[Any, ...] = (
                tokens[:, start : start + columns],
                np.where(positions < lengths[:, None], positions, -1),
                np.where((last >= 0) & (last < columns), last, -1),
                (lengths > 0) & (start == 0),
                None if index is None else index[:, start : start + columns],
            )
            features = None if shown is None else shown.features_BMD
            self._memory = read_prompts(self._transformer, self._put(Prompts(*parts)), self._memory, features)

    def _collect(self, block: Block) -> Iterator[Progress]:
        """Add a block's tokens to their sequences, free the rows of those that ended, and yield what is new."""
        tokens_NB = np.asarray(block.tokens_NB)
        logprobs_NB = np.asarray(block.logprobs_NB)
        for row, sequence in enumerate(self._sequences):
            if sequence is None:
                continue
            count = int(np.sum(tokens_NB[:, row] >= 0))
            if count == 0:
                continue
            new = tokens_NB[:count, row].tolist()
            logprobs = logprobs_NB[:count, row].tolist()
            if not np.isfinite(logprobs).all():
                before = len(sequence.request.prompt) + len(sequence.tokens)
                raise ValueError(
                    f"the model computes no finite probabilities after {before} tokens of prompt {sequence.request.number + 1}; "
                    "its weights are damaged, or their dtype is too small"
                )
            self._rows.tokens_B[row] = new[-1]
            self._rows.positions_B[row] += count
            self._rows.remaining_B[row] -= count
            stop: StopReason | None = None
            if new[-1] in self._plan.sampling.end_ids:
                stop = "end_token"
                new.pop()
            elif self._rows.remaining_B[row] == 0:
                stop = "max_tokens"
            checked = len(sequence.tokens)
            sequence.tokens += new
            if sequence.schema_state is not None:
                sequence.schema_state.add(new)
            if self._plan.stop_texts is not None:
                until = self._plan.stop_texts.tokens_until_stop(sequence.request.prompt, sequence.tokens, checked)
                if until is not None:
                    stop = "stop_text"
                    new = new[: until - checked]
            if stop is not None:
                self._rows.remaining_B[row] = 0
                self._sequences[row] = None
            yield Progress(sequence.request.number, new, logprobs[: len(new)], stop)

    def _choice(self) -> Choice:
        """Return how the next tokens are chosen; with a schema, among those that it allows."""
        if self._plan.schema is None:
            return Choice(self._values)
        allowed = np.ones((len(self._sequences), self._vocab_size), bool)
        for row, sequence in enumerate(self._sequences):
            if sequence is not None and sequence.schema_state is not None:
                allowed[row] = sequence.schema_state.allowed(self._vocab_size)
        return Choice(self._values, put_equal(allowed, self._mesh, P(BATCH)))

    def _put(self, arrays: Any) -> Any:
        """Return NumPy arrays (B,) and (B, T) on the mesh."""

        def put(x: np.ndarray) -> jax.Array:
            return put_equal(x, self._mesh, P(BATCH, "context") if x.ndim == 2 else P(BATCH))

        return jax.tree.map(put, arrays)
