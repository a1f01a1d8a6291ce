"""Run a model on fixed prompts: logits at every position, and the experts that its routers chose.

Everything is in float32 with plain kernels that every platform has, so that two sets of weights differ only by their values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import PyTreeDef

from moe_train import config
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine import progress
from moe_train.machine.mesh import BATCH
from moe_train.model.attention.places import TokenPlaces
from moe_train.model.moe.layer import MoE
from moe_train.model.parameters import Parameters, combine_some, parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.transformer import abstract_model
from moe_train.weights import arrays
from moe_train.weights.arrays import LazyArray, LazyParameters

PROMPT_TOKENS = 16
"""Number of tokens of a prompt."""
PROMPT_TEXTS = (
    "The proof of the pudding is in the eating; the proof of a file is in the reading.",
    "def add(a: int, b: int) -> int:\n    return a + b\n\nprint(add(2, 3))  # 5, as it has to be",
)


WeightTransform = Callable[[Parameters], Parameters]
"""Maps weights to those that are run in their place, such as merged and rounded ones."""


class Prompts(NamedTuple):
    """Rows of tokens and their positions, (P, T); a position of -1 is padding."""

    tokens_PT: np.ndarray
    positions_PT: np.ndarray


class ProbeLogits(NamedTuple):
    """The logits of a model on all prompts."""

    logits_PTV: np.ndarray
    """Logits in float32."""
    routers_LPTE: np.ndarray | None
    """The routers' logits; None for a dense model."""


def fixed_prompts(model: config.Model, tokenizer: Tokenizer | None) -> Prompts:
    """Build four prompts: two texts, random tokens, and random tokens at positions spread over the model's whole context.

    Without a tokenizer, random tokens replace the texts.
    """
    tokens_PT = np.random.default_rng(0).integers(0, model.vocab_size, (4, min(PROMPT_TOKENS, model.max_seq_len)))
    positions_PT = np.tile(np.arange(tokens_PT.shape[1]), (4, 1))
    # Errors of RoPE scaling and of windows show only at distant positions.
    positions_PT[3] = np.linspace(0, model.max_seq_len - 1, tokens_PT.shape[1]).astype(int)
    if tokenizer is not None:
        for row, text in enumerate(PROMPT_TEXTS):
            ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)
            ids = ids[: tokens_PT.shape[1]]
            tokens_PT[row, : len(ids)] = ids
            positions_PT[row, len(ids) :] = -1
    return Prompts(tokens_PT, positions_PT)


def structure_and_shapes(
    model: config.Model, lora: config.Lora | None, dtype: config.Dtype
) -> tuple[PyTreeDef, dict[str, jax.ShapeDtypeStruct]]:
    """Return the structure and shapes of a model that computes in float32 with plain kernels; a mesh must be in force.

    Args:
        model: the architecture.
        lora: the section of the adapters; None without adapters.
        dtype: dtype of the weights.
    """
    compute = config.Compute(dtype="float32", param_dtype=dtype, attention="reference", grouped_matmul="blocked")
    return parameters(abstract_model(model, compute, lora))


def probe_logits(structure: PyTreeDef, weights: LazyParameters, prompts: Prompts, transform: WeightTransform = dict) -> ProbeLogits:
    """Run the model on the prompts, on the mesh in force, of which several processes may hold parts.

    Of weights in files, one period of layers is in memory at a time.

    Args:
        structure: the model's structure, after `transform`.
        weights: weights by path, in memory or in files.
        prompts: the prompts.
        transform: applied to a part of the weights, such as one layer's, before it is run.
    """
    mesh = jax.sharding.get_mesh()
    rows, length = prompts.tokens_PT.shape
    row_padding = -rows % math.prod(mesh.shape[axis] for axis in BATCH)
    token_padding = -length % mesh.shape["context"]

    def put(x_PT: np.ndarray, fill: int) -> jax.Array:
        padded = np.pad(x_PT, ((0, row_padding), (0, token_padding)), constant_values=fill).astype(np.int32)
        # Every process has all prompts and gives its own devices their parts.
        return jax.make_array_from_callback(padded.shape, NamedSharding(mesh, P(BATCH, "context")), lambda index: padded[index])

    # By default a TPU rounds the operands of float32 products to bfloat16.
    with jax.default_matmul_precision("highest"):
        logits, routers = _forward(structure, weights, transform, put(prompts.tokens_PT, 0), put(prompts.positions_PT, -1))
    unpadded = (slice(rows), slice(length))
    if routers is None:
        return ProbeLogits(np.asarray(logits)[unpadded], None)
    return ProbeLogits(np.asarray(logits)[unpadded], np.asarray(routers)[:, *unpadded])


def _forward(
    structure: PyTreeDef, weights: LazyParameters, transform: WeightTransform, tokens_BT: jax.Array, positions_BT: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Return float32 logits (B, T, V) and those of the routers (L, B, T, E), gathered on every device.

    The model is run period by period: in one program for all of them, XLA would make float32 copies of all weights at once.
    """
    stacks = _by_stack(weights)
    outside_layers = {path: x for path, x in weights.items() if not ParameterPath.parse(path).in_layer}
    ends = transform(arrays.read_lazy(outside_layers))  # the embedding, the last norm and the head
    repeats = [next(iter(stack.values())).shape[0] for stack in stacks]
    report_periods = progress.counted("answering prompts", sum(repeats))
    x_BTD = _embed(structure, ends, tokens_BT)
    router_logits: list[jax.Array] = []
    for stack_index, stack in enumerate(stacks):
        for i in range(repeats[stack_index]):
            period = transform(_period_of(stack, i))
            x_BTD, routers = _run_period(structure, stack_index, period, x_BTD, positions_BT)
            router_logits += routers
            x_BTD.block_until_ready()  # so that the weights of the next period are loaded only after this one's are freed
            report_periods(1)
    return _logits(structure, ends, x_BTD), jnp.stack(router_logits) if router_logits else None


def _by_stack(weights: LazyParameters) -> list[LazyParameters]:
    """Return the weights of each stack, in order."""
    stacks: dict[int, dict[str, jax.Array | LazyArray]] = {}
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
    """Return entry `i` of the first dim of every array; i is traced, so that one program serves all periods."""
    return jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, i, 1), stack)


@partial(jax.jit, static_argnums=0)
def _embed(structure: PyTreeDef, weights: Parameters, tokens_BT: jax.Array) -> jax.Array:
    model = combine_some(structure, weights)
    return model.embed(tokens_BT, model.dtype)


@partial(jax.jit, static_argnums=(0, 1))
def _run_period(
    structure: PyTreeDef, stack: int, weights: Parameters, x_BTD: jax.Array, positions_BT: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """Return x after a period of a stack, and the logits of its routers."""
    places = TokenPlaces(positions_BT, (positions_BT >= 0).astype(jnp.int32))
    router_logits = []
    model = combine_some(structure, weights)
    rotation = model.rotation(positions_BT)
    for layer in jax.tree.map(lambda w: w[0], model.stacks[stack].layers):
        if isinstance(layer.ffn, MoE):
            # The layer does not return its router's logits, so its first half is computed once more.
            y_BTD, *_ = layer.attention(layer.attention_norm(x_BTD), places, rotation)
            router_logits.append(jax.sharding.reshard(layer.ffn.router(layer.ffn_norm(x_BTD + y_BTD)), P()))
        x_BTD, *_ = layer(x_BTD, places, rotation)
    return x_BTD, router_logits


@partial(jax.jit, static_argnums=0)
def _logits(structure: PyTreeDef, weights: Parameters, x_BTD: jax.Array) -> jax.Array:
    model = combine_some(structure, weights)
    return jax.sharding.reshard(model.logits(model.final_norm(x_BTD)), P())
