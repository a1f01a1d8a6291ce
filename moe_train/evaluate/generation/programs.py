"""The two compiled programs of generation: one reads part of the prompts, the other generates a block of tokens.

Global view. Each is compiled once for each number of rows and of slots, and for each `SamplingKind`. Rows are split over the batch
axes of the mesh and slots over `context`. The choice of a token is local to a row, whose logits are gathered over `tensor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped

from moe_train import config
from moe_train.evaluate.generation.sampling import DrawIds, Draws, SamplingKind, SamplingValues, TokenMasks, choose_tokens
from moe_train.machine.mesh import BATCH, axis_size
from moe_train.model.attention.kinds import Cache
from moe_train.model.encoders.media import Features, Media
from moe_train.model.transformer import Transformer, empty_caches

BLOCK_TOKENS = 32
"""Number of tokens that a block has room for; a program argument says how many are generated."""

Caches = Sequence[Sequence[Cache]]


class Rows(NamedTuple):
    """The state of the rows of a batch between blocks, arrays (B,); the host keeps it as NumPy arrays."""

    tokens_B: Int[Array, " B"]
    """The newest token of each sequence, which is not in the cache yet."""
    positions_B: Int[Array, " B"]
    """Position of that token."""
    requests_B: Int[Array, " B"]
    """Index of the request, for the draws."""
    remaining_B: Int[Array, " B"]
    """Number of tokens that may still be generated; 0 for rows that are not running."""


class Block(NamedTuple):
    """What a block generated, replicated on all devices."""

    tokens_NB: Int[Array, "N B"]
    """Tokens in the order of their generation, the end token included; -1 where a row was not running."""
    logprobs_NB: Float[Array, "N B"]


class Memory(NamedTuple):
    """What stays on the device between programs; each program takes it over and returns it extended."""

    caches: Caches
    hidden_BD: Float[Array, "B D"]
    """Final hidden state of each prompt's last token, as far as it has been read."""
    seen_BV: Bool[Array, "B V"] | None
    """Tokens that occur in each sequence; None without a repetition penalty."""


class Choice(NamedTuple):
    """How the next tokens are chosen."""

    values: SamplingValues
    allowed_BV: Bool[Array, "B V"] | None = None
    """Tokens that may come next, for a single token; None for all."""


class Prompts(NamedTuple):
    """A part of the prompts, arrays with B rows."""

    tokens_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]
    """-1 for padding, and in rows that are not reading."""
    last_B: Int[Array, " B"]
    """Column of the prompt's last token; -1 if it is not in this part."""
    is_new_B: Bool[Array, " B"]
    """Whether the row starts a new sequence with this part."""
    feature_index_BT: Int[Array, "B T"] | None = None
    """Index of the feature that a token of a picture or of sound stands for, -1 for other tokens; None without either."""


@jax.jit
def media_features(transformer: Transformer, media: Media) -> Float[Array, "B M D"]:
    """Return the features of the pictures or the sound of each row."""
    return transformer.media_features(media.placed())


@partial(jax.jit, static_argnames=("model", "rows", "slots", "dtype", "keeps_tokens"))
def empty_memory(
    transformer: Transformer, *, model: config.Model, rows: int, slots: int, dtype: jnp.dtype, keeps_tokens: bool
) -> Memory:
    """Return memory for `rows` sequences of at most `slots` tokens.

    Args:
        transformer: the model, whose stacks the caches follow.
        model: its architecture.
        rows: number of sequences.
        slots: largest number of tokens of a sequence.
        dtype: dtype of the caches.
        keeps_tokens: whether the tokens that occur are kept, for a repetition penalty.
    """
    hidden_BD = jnp.zeros((rows, model.model_dim), transformer.dtype, out_sharding=P(BATCH))
    seen_BV = jnp.zeros((rows, model.vocab_size), bool, out_sharding=P(BATCH)) if keeps_tokens else None
    return Memory(empty_caches(transformer, model, rows, slots, dtype), hidden_BD, seen_BV)


@partial(jax.jit, donate_argnames="memory")
def read_prompts(
    transformer: Transformer, prompts: Prompts, memory: Memory, features_BMD: Float[Array, "B M D"] | None = None
) -> Memory:
    """Read a part of the prompts into the caches; `features_BMD` are those of the pictures or the sound of each row."""
    features: Features | None = None
    if features_BMD is not None:
        assert prompts.feature_index_BT is not None
        features = Features(features_BMD, prompts.feature_index_BT)
    hidden_BTD, caches = transformer.decode(prompts.tokens_BT, prompts.positions_BT, memory.caches, features)
    batch = P(BATCH)

    def last(hidden_bTD: Float[Array, "b T D"], last_b: Int[Array, " b"], before_bD: Float[Array, "b D"]) -> Float[Array, "b D"]:
        own_bD = jnp.take_along_axis(hidden_bTD, jnp.maximum(last_b, 0)[:, None, None], axis=1)[:, 0]
        return jnp.where(last_b[:, None] >= 0, own_bD, before_bD)

    select = jax.shard_map(last, in_specs=(batch, batch, batch), out_specs=batch)
    hidden_BD = select(_per_row(hidden_BTD), prompts.last_B, memory.hidden_BD)
    seen_BV = memory.seen_BV
    if seen_BV is not None:
        mark = jax.shard_map(_mark_prompt, in_specs=batch, out_specs=batch)
        seen_BV = mark(seen_BV, _per_row(prompts.tokens_BT), _per_row(prompts.positions_BT), prompts.is_new_B)
    return Memory(caches, hidden_BD, seen_BV)


def _mark_prompt(
    seen_bV: Bool[Array, "b V"], tokens_bT: Int[Array, "b T"], positions_bT: Int[Array, "b T"], is_new_b: Bool[Array, " b"]
) -> Bool[Array, "b V"]:
    """Add the tokens of a prompt to those that occur, after forgetting those of an earlier sequence. Local view."""
    seen_bV &= ~is_new_b[:, None]
    # Padding gets an index past the end, which `mode="drop"` skips.
    tokens_bT = jnp.where(positions_bT >= 0, tokens_bT, seen_bV.shape[1])
    return seen_bV.at[jnp.arange(seen_bV.shape[0])[:, None], tokens_bT].set(True, mode="drop")


@partial(jax.jit, static_argnames="kind")
def first_tokens(
    transformer: Transformer,
    memory: Memory,
    rows: Rows,
    choice: Choice,
    *,
    kind: SamplingKind,
) -> Block:
    """Choose the token after each prompt; `rows.positions_B` is the position that it will have."""
    draws = _choose(transformer, memory, rows, choice, kind)
    return _replicated(Block(draws.tokens_B[None], draws.logprobs_B[None]))


@partial(jax.jit, static_argnames="kind", donate_argnames="memory")
def generate_block(
    transformer: Transformer,
    memory: Memory,
    rows: Rows,
    limits: tuple[Int[Array, ""], Int[Array, " I"]],
    choice: Choice,
    *,
    kind: SamplingKind,
) -> tuple[Memory, Block]:
    """Generate tokens until each row has ended, or the block is full.

    Args:
        transformer: the model.
        memory: caches and tokens that occur, which are donated.
        rows: the state of the rows.
        limits: number of tokens to generate, at most BLOCK_TOKENS, and the tokens that end a sequence.
        choice: settings of the choice of a token.
        kind: the steps of the choice.
    """
    steps, end_ids = limits
    shape = (BLOCK_TOKENS, rows.tokens_B.shape[0])
    empty = Block(
        jnp.full(shape, -1, jnp.int32, out_sharding=P(None, BATCH)), jnp.zeros(shape, jnp.float32, out_sharding=P(None, BATCH))
    )

    caches = memory.caches

    def goes_on(carry: tuple[Int[Array, ""], Memory, Rows, Block]) -> Bool[Array, ""]:
        i, _, rows, _ = carry
        return (i < steps) & jnp.any(rows.remaining_B > 0)

    def step(carry: tuple[Int[Array, ""], Memory, Rows, Block]) -> tuple[Int[Array, ""], Memory, Rows, Block]:
        i, memory, rows, block = carry
        is_running_B = rows.remaining_B > 0
        tokens_BC = _first_of_columns(rows.tokens_B, 0)
        positions_BC = _first_of_columns(jnp.where(is_running_B, rows.positions_B, -1), -1)
        hidden_BCD, extended = transformer.decode(tokens_BC, positions_BC, _with_unit_dims(memory.caches, caches))
        memory = Memory(_without_unit_dims(extended), _per_row(hidden_BCD)[:, 0], memory.seen_BV)
        next_rows = rows._replace(positions_B=rows.positions_B + 1)
        if memory.seen_BV is not None:
            mark = jax.shard_map(_mark_token, in_specs=P(BATCH), out_specs=P(BATCH))
            memory = memory._replace(seen_BV=mark(memory.seen_BV, jnp.where(is_running_B, rows.tokens_B, -1)))
        draws = _choose(transformer, memory, next_rows, choice, kind)
        has_ended_B = jnp.any(draws.tokens_B[:, None] == end_ids, axis=1)
        remaining_B = jnp.where(has_ended_B, 0, jnp.maximum(rows.remaining_B - 1, 0))
        block = Block(
            jax.lax.dynamic_update_index_in_dim(block.tokens_NB, jnp.where(is_running_B, draws.tokens_B, -1), i, 0),
            jax.lax.dynamic_update_index_in_dim(block.logprobs_NB, draws.logprobs_B, i, 0),
        )
        return i + 1, memory, next_rows._replace(tokens_B=draws.tokens_B, remaining_B=remaining_B), block

    carried = memory._replace(caches=_without_unit_dims(caches))
    _, carried, _, block = jax.lax.while_loop(goes_on, step, (jnp.int32(0), carried, rows, empty))
    return carried._replace(caches=_with_unit_dims(carried.caches, caches)), _replicated(block)


def _without_unit_dims(caches: Caches) -> Caches:
    """Return the caches of a single sequence and layer without these dims, for which XLA:CPU would copy them at each token."""
    return jax.tree.map(lambda x: jax.lax.squeeze(x, (0, 1)) if x.shape[:2] == (1, 1) else x, caches)


def _with_unit_dims(caches: Caches, like: Caches) -> Caches:
    """Undo `_without_unit_dims` for caches of the shapes and shardings of `like`."""

    def restore(x: jax.Array, y: jax.Array) -> jax.Array:
        if x.ndim == y.ndim:
            return x
        # Without them the dim of sequences has lost its mesh axes, all of them of size 1.
        return jax.sharding.reshard(jax.lax.expand_dims(x, (0, 1)), jax.typeof(y).sharding)

    return jax.tree.map(restore, caches, like)


def _mark_token(seen_bV: Bool[Array, "b V"], tokens_b: Int[Array, " b"]) -> Bool[Array, "b V"]:
    """Add a token of each row, -1 for none, to those that occur. Local view."""
    tokens_b = jnp.where(tokens_b >= 0, tokens_b, seen_bV.shape[1])
    return seen_bV.at[jnp.arange(seen_bV.shape[0]), tokens_b].set(True, mode="drop")


def _choose(
    transformer: Transformer,
    memory: Memory,
    rows: Rows,
    choice: Choice,
    kind: SamplingKind,
) -> Draws:
    """Choose the next token of each row from its hidden state."""
    # `context` splits the columns of a step: each of its devices computes the logits of its own copy.
    shape = (memory.hidden_BD.shape[0], axis_size("context"), memory.hidden_BD.shape[1])
    hidden_BCD = jnp.broadcast_to(memory.hidden_BD[:, None], shape, out_sharding=P(BATCH, "context", None))
    logits_BV = _per_row(transformer.logits(hidden_BCD))[:, 0]

    def local(logits_bV: Float[Array, "b V"], ids: DrawIds, masks: TokenMasks, values: SamplingValues) -> Draws:
        return choose_tokens(logits_bV, kind, values, ids, masks)

    batch = P(BATCH)
    choose = jax.shard_map(local, in_specs=(batch, batch, batch, P()), out_specs=batch)
    masks = TokenMasks(memory.seen_BV, choice.allowed_BV)
    return choose(logits_BV, DrawIds(rows.requests_B, rows.positions_B), masks, choice.values)


def _per_row(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Return an array with each row whole on the devices of its sequence."""
    return jax.sharding.reshard(x, P(BATCH, *(None,) * (x.ndim - 1)))


def _first_of_columns(x_B: Int[Array, " B"], padding: int) -> Int[Array, "B C"]:
    """Return x as the first of as many columns as devices along `context`, which split them."""
    columns = axis_size("context")
    x_BC = jnp.pad(x_B[:, None], ((0, 0), (0, columns - 1)), constant_values=padding)
    return jax.sharding.reshard(x_BC, P(BATCH, "context"))


def _replicated(block: Block) -> Block:
    """Return a block that every process can read."""
    return jax.tree.map(lambda x: jax.sharding.reshard(x, P()), block)
