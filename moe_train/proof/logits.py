"""Run a model on fixed prompts: logits at every position, and the experts that its routers chose.

Everything is in float32 with plain kernels that every platform has, so that two sets of weights differ only by their values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine import progress
from moe_train.machine.mesh import BATCH
from moe_train.model.moe.layer import MoE
from moe_train.model.parameters import Parameters, combine_some, parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.transformer import init_model
from moe_train.weights import arrays
from moe_train.weights.arrays import LazyArray, LazyParameters

LENGTH = 16
"""Tokens of a prompt."""
TEXTS = (
    "The proof of the pudding is in the eating; the proof of a file is in the reading.",
    "def add(a: int, b: int) -> int:\n    return a + b\n\nprint(add(2, 3))  # 5, as it has to be",
)


Altered = Callable[[Parameters], Parameters]
"""Maps weights to those that are run instead."""


class Prompts(NamedTuple):
    """Rows of tokens and their positions, (P, T); a position of -1 is padding."""

    tokens_PT: np.ndarray
    positions_PT: np.ndarray


class Answers(NamedTuple):
    """The results for all prompts."""

    logits_PTV: np.ndarray
    """Logits in float32."""
    routers_LPTE: np.ndarray | None
    """The routers' logits; None for a dense model."""


def fixed_prompts(model: config.Model, tokenizer: Tokenizer | None) -> Prompts:
    """Build four prompts: two texts, random tokens, and random tokens at positions spread over the model's whole context.

    Without a tokenizer, random tokens replace the texts.
    """
    tokens_PT = np.random.default_rng(0).integers(0, model.vocab_size, (4, min(LENGTH, model.max_seq_len)))
    positions_PT = np.tile(np.arange(tokens_PT.shape[1]), (4, 1))
    # up to the last position of the context
    positions_PT[3] = np.linspace(0, model.max_seq_len - 1, tokens_PT.shape[1]).astype(int)
    for row, text in enumerate(TEXTS if tokenizer else ()):
        assert tokenizer is not None
        ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)
        ids = ids[: tokens_PT.shape[1]]
        tokens_PT[row, : len(ids)] = ids
        positions_PT[row, len(ids) :] = -1
    return Prompts(tokens_PT, positions_PT)


def structure_and_shapes(
    model: config.Model, lora: config.Lora | None, dtype: config.Dtype
) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
    """Return the structure and shapes of a model that computes in float32 with plain kernels; a mesh must be in force.

    Args:
        model: the architecture.
        lora: the section of the adapters; None without adapters.
        dtype: dtype of the weights.
    """
    compute = config.Compute(dtype="float32", param_dtype=dtype, attention="reference", grouped_matmul="blocked")
    return parameters(jax.eval_shape(lambda: init_model(0, model, compute, lora)))


def answers(structure: Any, weights: LazyParameters, prompts: Prompts, altered: Altered = dict) -> Answers:
    """Run the model on the prompts, on the mesh in force, of which several processes may hold parts.

    Of weights in files, one period of layers is in memory at a time.

    Args:
        structure: the model's structure, after `altered`.
        weights: weights by path, in memory or in files.
        prompts: the prompts.
        altered: applied to a part of the weights, such as one layer's, before it is run.
    """
    mesh = jax.sharding.get_mesh()
    rows, length = prompts.tokens_PT.shape
    pad = (0, -rows % math.prod(mesh.shape[axis] for axis in BATCH)), (0, -length % mesh.shape["context"])

    def put(x_PT: np.ndarray, fill: int) -> jax.Array:
        padded = np.pad(x_PT, pad, constant_values=fill).astype(np.int32)
        return jax.make_array_from_callback(padded.shape, NamedSharding(mesh, P(BATCH, "context")), lambda index: padded[index])

    with jax.default_matmul_precision("highest"):
        logits, routers = _forward(structure, weights, altered, put(prompts.tokens_PT, 0), put(prompts.positions_PT, -1))
    unpadded = (slice(rows), slice(length))
    if routers is None:
        return Answers(np.asarray(logits)[unpadded], None)
    return Answers(np.asarray(logits)[unpadded], np.asarray(routers)[:, *unpadded])


def _forward(
    structure: Any, weights: LazyParameters, altered: Altered, tokens_BT: jax.Array, positions_BT: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Return float32 logits (B, T, V) and those of the routers (L, B, T, E), whole on every device.

    The model is run period by period: in one program for all of them, XLA would make float32 copies of all weights at once.
    """
    stacks = _by_stack(weights)
    ends = altered(arrays.read_lazy({path: x for path, x in weights.items() if not ParameterPath.parse(path).in_layer}))
    repeats = [next(iter(stack.values())).shape[0] for stack in stacks]
    run = progress.counted("answering prompts", sum(repeats))
    x_BTD = _embed(structure, ends, tokens_BT)
    router_logits: list[jax.Array] = []
    for number, stack in enumerate(stacks):
        for i in range(repeats[number]):
            period = altered(_period_of(stack, i))
            x_BTD, routers = _period(structure, number, period, x_BTD, positions_BT)
            router_logits += routers
            x_BTD.block_until_ready()  # so that the weights of the next period are loaded only after this one's are freed
            run(1)
    return _logits(structure, ends, x_BTD), jnp.stack(router_logits) if router_logits else None


def _by_stack(weights: LazyParameters) -> list[LazyParameters]:
    """Return the weights of each stack, in order."""
    stacks: dict[int, dict[str, Any]] = {}
    for path, x in weights.items():
        stack = ParameterPath.parse(path).stack
        if stack is not None:
            stacks.setdefault(stack, {})[path] = x
    return [stack_weights for _, stack_weights in sorted(stacks.items())]


def _period_of(stack: LazyParameters, i: int) -> Parameters:
    """Return the weights of period `i`, with a leading dim of 1."""
    in_memory = {path: x for path, x in stack.items() if isinstance(x, jax.Array)}
    return _at(in_memory, i) | arrays.read_lazy({path: x.layers(i) for path, x in stack.items() if isinstance(x, LazyArray)})


@jax.jit
def _at(stack: Parameters, i: jax.Array | int) -> Parameters:
    return jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, i, 1), stack)


@partial(jax.jit, static_argnums=0)
def _embed(structure: Any, weights: Parameters, tokens_BT: jax.Array) -> jax.Array:
    model = combine_some(structure, weights)
    return model.embed(tokens_BT, model.dtype)


@partial(jax.jit, static_argnums=(0, 1))
def _period(
    structure: Any, stack: int, weights: Parameters, x_BTD: jax.Array, positions_BT: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """Return x after a period of a stack, and the logits of its routers."""
    segment_ids_BT, seen = (positions_BT >= 0).astype(jnp.int32), []
    for layer in jax.tree.map(lambda w: w[0], combine_some(structure, weights).stacks[stack].layers):
        if isinstance(layer.ffn, MoE):
            y_BTD, *_ = layer.attention(layer.attention_norm(x_BTD), positions_BT, segment_ids_BT)
            seen.append(jax.sharding.reshard(layer.ffn.router(layer.ffn_norm(x_BTD + y_BTD)), P()))
        x_BTD, *_ = layer(x_BTD, positions_BT, segment_ids_BT)
    return x_BTD, seen


@partial(jax.jit, static_argnums=0)
def _logits(structure: Any, weights: Parameters, x_BTD: jax.Array) -> jax.Array:
    model = combine_some(structure, weights)
    return jax.sharding.reshard(model.logits(model.final_norm(x_BTD)), P())


# --- comparing ---------------------------------------------------------------------------------------------------


class Reference(NamedTuple):
    """Answers in the form in which they are kept: the largest logits of each position, and the chosen experts."""

    top_ids_PTn: np.ndarray
    top_logits_PTn: np.ndarray
    experts_LPTA: np.ndarray | None
    """Ids in ascending order; None for a dense model."""


class Difference(NamedTuple):
    """The difference between answers and a reference."""

    logits: float
    """Largest difference over the largest logit, among the compared positions."""
    positions: int
    """Number of compared positions."""
    excluded: int
    """Number of positions that follow a near-tie with a different outcome, and are not compared."""
    choices: int
    """Number of compared router choices."""
    near_ties: int
    """Number of these with a different outcome that were near-ties."""
    wrong: int
    """Number of these with a different outcome that were not near-ties."""
    first_wrong: tuple[int, int, int] | None
    """Layer, prompt and position of the first wrong choice; None without one."""


def reference(found: Answers, model: config.Model, top: int | None = None) -> Reference:
    """Reduce answers to a reference.

    Args:
        found: the answers.
        model: the architecture.
        top: number of logits per position to keep; None for all.
    """
    ids = np.argsort(-found.logits_PTV, axis=-1, kind="stable")[..., :top]
    return Reference(ids, np.take_along_axis(found.logits_PTV, ids, axis=-1), _chosen(found, model))


def compare(found: Answers, wanted: Reference, prompts: Prompts, model: config.Model, near: float) -> Difference:
    """Compare answers with a reference.

    A near-tie with a different outcome changes all later layers and the logits from that position on, so these are not compared.

    Args:
        found: the answers.
        wanted: the reference.
        prompts: the prompts of both.
        model: the architecture.
        near: a router's choice is a near-tie if the last chosen logit and the first one not chosen differ by less than this
            share of the largest.
    """
    clean_PT = prompts.positions_PT >= 0
    total = int(clean_PT.sum())
    choices = ties = wrong = 0
    first = None
    chosen = _chosen(found, model)
    if chosen is not None:
        assert wanted.experts_LPTA is not None and found.routers_LPTE is not None
        A = chosen.shape[-1]
        layers = config.sparse_layers(model)
        for layer, logits_PTE, chosen_PTA, reference_PTA in zip(
            layers, found.routers_LPTE, chosen, wanted.experts_LPTA, strict=True
        ):
            sorted_PTE = -np.sort(-logits_PTE, axis=-1)
            gap_PT = np.ones(clean_PT.shape)
            if sorted_PTE.shape[-1] > A:
                gap_PT = sorted_PTE[..., A - 1] - sorted_PTE[..., A]
            tie_PT = gap_PT < near * np.abs(sorted_PTE).max()
            differ_PT = np.any(chosen_PTA != reference_PTA, axis=-1) & clean_PT
            choices += int(clean_PT.sum())
            ties += int((differ_PT & tie_PT).sum())
            bad = np.argwhere(differ_PT & ~tie_PT)
            wrong += len(bad)
            if len(bad) and first is None:
                first = layer, int(bad[0][0]), int(bad[0][1])
            # Attention spreads a different choice to all later positions, but not to earlier ones.
            clean_PT = clean_PT & ~np.maximum.accumulate(differ_PT, axis=1)
    compared_PTn = np.take_along_axis(found.logits_PTV, wanted.top_ids_PTn, axis=-1)
    compared_PTn[..., 0] = found.logits_PTV.max(axis=-1)  # the largest of all, so that another token with a larger logit is noticed
    off = np.abs(compared_PTn - wanted.top_logits_PTn)[clean_PT]
    largest = float(np.abs(wanted.top_logits_PTn).max())
    worst = math.inf
    if np.all(np.isfinite(off)) and largest:
        worst = float(off.max(initial=0.0)) / largest
    return Difference(worst, int(clean_PT.sum()), total - int(clean_PT.sum()), choices, ties, wrong, first)


def _chosen(found: Answers, model: config.Model) -> np.ndarray | None:
    """Return the chosen experts in ascending order, (L, P, T, A); None for a dense model."""
    if found.routers_LPTE is None:
        return None
    assert isinstance(model.ffn, config.MoeFfn)
    return np.sort(np.argsort(-found.routers_LPTE, axis=-1, kind="stable")[..., : model.ffn.experts_per_token], axis=-1)
