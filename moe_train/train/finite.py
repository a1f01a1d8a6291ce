"""Where a step stops being finite: flags for each weight, each module's output and each gradient.

These programs run once, after a step whose loss or gradient was not finite; the training step itself has no such checks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from moe_train.model.attention.kinds import apply_attention
from moe_train.model.attention.places import TokenPlaces
from moe_train.model.attention.rope import Rotation
from moe_train.model.moe.layer import MoE
from moe_train.model.parameters import Parameters, combine
from moe_train.model.sharding.specs import place
from moe_train.model.stack import Layer, Stack
from moe_train.model.transformer import Transformer
from moe_train.train.gradients import step_gradients
from moe_train.train.objectives.objective import ModelWeights
from moe_train.train.step_definition import StepDefinition

Flags = dict[str, Bool[Array, "..."]]
"""Whether something is finite, by path. Arrays of a layer have a leading dim of repeats."""


class StepFlags(NamedTuple):
    """What is finite in a step, replicated over all devices."""

    weights: Flags
    """Flags by parameter path; () or (repeats,)."""
    outputs: Flags
    """Flags by path of the module (`embed`, `stacks.0.layers.0.attention`, `final_norm`); (B, T) or (repeats, B, T). Padding counts
    as finite. Empty for a batch type without tokens, positions and segments.
    """
    loss: Bool[Array, ""]
    gradients: Flags
    """Flags by parameter path; () or (repeats,)."""


def step_flags(
    definition: StepDefinition, trainable: Parameters, fixed: ModelWeights, batch: Any, key: Key[Array, ""] | None
) -> StepFlags:
    """Repeat the forward and backward pass of a step, and say what of it is finite.

    Args:
        definition: what the step does.
        trainable: the weights that are differentiated.
        fixed: all other weights of the model; `fixed.learned` holds its buffers.
        batch: the global batch of the step.
        key: PRNG key for the dropout of the adapters; None for no dropout.
    """
    weights = trainable | fixed.learned | fixed.frozen
    outputs: Flags = {}
    if {"tokens", "positions", "segment_ids"} <= set(getattr(batch, "_fields", ())):
        model = combine(definition.structure, weights)
        places = TokenPlaces(batch.positions, batch.segment_ids, getattr(batch, "prompt_ids", None))
        outputs = output_flags(model, batch.tokens, places)
    step = step_gradients(definition, trainable, fixed, batch, key)
    return jax.tree.map(
        _replicated, StepFlags(_array_flags(weights), outputs, jnp.isfinite(step.loss), _array_flags(step.gradients))
    )


def output_flags(model: Transformer, tokens_BT: Int[Array, "B T"], places: TokenPlaces) -> Flags:
    """Run the model layer by layer, without dropout, and return which outputs of its modules are finite."""
    places = jax.tree.map(lambda x: place(x, "BT"), places)
    is_padding_BT = places.segment_ids_BT == 0

    def finite(x_BTD: Float[Array, "B T D"]) -> Bool[Array, "B T"]:
        return jnp.all(jnp.isfinite(x_BTD), axis=-1) | is_padding_BT

    x_BTD = model.embed(place(tokens_BT, "BT"), model.dtype)
    flags = {"embed": finite(x_BTD)}
    rotation = model.rotation(places.positions_BT)
    for number, stack in enumerate(model.stacks):
        x_BTD, stack_flags = _run_stack(stack, x_BTD, places, rotation)
        for index, layer_flags in enumerate(stack_flags):
            for module, flag_RBTD in layer_flags.items():
                is_finite = jnp.all(flag_RBTD, axis=-1) | is_padding_BT
                flags[f"stacks.{number}.layers.{index}.{module}"] = is_finite
    flags["final_norm"] = finite(model.final_norm(x_BTD))
    return flags


def _run_stack(
    stack: Stack, x_BTD: Float[Array, "B T D"], places: TokenPlaces, rotation: Rotation
) -> tuple[Float[Array, "B T D"], list[dict[str, Bool[Array, "R B T 1"]]]]:
    """Run a stack as `Stack` does; the flags of the layers of its period have a leading dim of repeats."""

    def period(x_BTD: Float[Array, "B T D"], layers: list[Layer]) -> tuple[Float[Array, "B T D"], list[Flags]]:
        period_flags = []
        for layer in layers:
            x_BTD, layer_flags = _run_layer(layer, x_BTD, places, rotation)
            period_flags.append(layer_flags)
        return x_BTD, period_flags

    return jax.lax.scan(period, x_BTD, list(stack.layers))


def _run_layer(
    layer: Layer, x_BTD: Float[Array, "B T D"], places: TokenPlaces, rotation: Rotation
) -> tuple[Float[Array, "B T D"], Flags]:
    """Run a layer as `Layer` does, with a flag (B, T, 1) for each of its modules."""

    def finite(y_BTD: Float[Array, "B T D"]) -> Bool[Array, "B T 1"]:
        return jnp.all(jnp.isfinite(y_BTD), axis=-1, keepdims=True)

    h_BTD = layer.attention_norm(x_BTD)
    y_BTD, _ = apply_attention(layer.attention, h_BTD, places, rotation)
    flags = {"attention_norm": finite(h_BTD), "attention": finite(y_BTD)}
    x_BTD += y_BTD
    h_BTD = layer.ffn_norm(x_BTD)
    y_BTD = layer.ffn(h_BTD, places.segment_ids_BT)[0] if isinstance(layer.ffn, MoE) else layer.ffn(h_BTD)
    return x_BTD + y_BTD, flags | {"ffn_norm": finite(h_BTD), "ffn": finite(y_BTD)}


def _array_flags(arrays: Parameters) -> Flags:
    """Return whether each array is finite; for an array of layers, one flag for each repeat."""
    flags = {}
    for path, x in arrays.items():
        if jnp.issubdtype(x.dtype, jnp.floating):
            first = 1 if path.startswith("stacks.") else 0
            flags[path] = jnp.all(jnp.isfinite(x), axis=tuple(range(first, x.ndim)))
    return flags


def _replicated(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    return jax.sharding.reshard(x, P(*(None,) * x.ndim))
