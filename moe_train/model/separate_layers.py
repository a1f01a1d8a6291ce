"""A model whose layers and experts are separate arrays: the fast form for decoding where slices of stacked weights are copies.

A scan over stacked layers slices the weights of one layer in each iteration, and a layer slices those of each expert. In training
these copies are small beside the products over thousands of tokens. Decoding multiplies each weight by a single token per sequence,
so that on CPUs a copy costs more than the product: 70% of the time of a token for a Mixtral of 4 layers.
"""

from __future__ import annotations

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from moe_train.machine.mesh import axis_size
from moe_train.model.moe.expert_weights import ExpertWeights, InStack, SeparateExperts
from moe_train.model.moe.layer import MoE
from moe_train.model.quantize import Quantized
from moe_train.model.sharding.specs import spec_of
from moe_train.model.stack import Stack
from moe_train.model.transformer import Transformer

MAX_EXPERTS = 16
"""Largest number of experts that are separated: each has a program of its own, which takes time to compile."""
MIN_EXPERT_BYTES = 2**16
"""Smallest size of the matrices of experts that are separated; a copy of less is cheap."""


def separate_layers(transformer: Transformer, *, release: bool = False) -> Transformer:
    """Return the same model with one stack for each repeat of a period, and separate experts, so that no weight has to be sliced.

    Experts stay stacked where they are quantized, many (MAX_EXPERTS), small (MIN_EXPERT_BYTES), or split over devices.

    Args:
        transformer: the model.
        release: delete each stacked array as soon as it has been separated, so that only one of them is in memory twice. The
            given model cannot be used afterwards.
    """
    separated = jax.tree.map(lambda x: x, transformer)  # a new object, whose attributes can be replaced
    separated.stacks = nnx.List([one for stack in separated.stacks for one in _repeats(stack, release)])
    for stack in separated.stacks:
        for layer in stack.layers:
            if isinstance(layer.ffn, MoE):
                _separate_experts(layer.ffn, release)
    return separated


def _repeats(stack: Stack, release: bool) -> list[Stack]:
    """Split a stack into stacks of a single repeat."""
    if stack.repeats == 1:
        return [stack]
    leaves, structure = jax.tree.flatten(stack)
    slices = []
    for leaf in leaves:
        slices.append(_slices(leaf))
        if release:
            leaf.delete()
    return [jax.tree.unflatten(structure, repeat) for repeat in zip(*slices, strict=True)]


@jax.jit
def _slices(x: Shaped[Array, "..."]) -> list[Shaped[Array, "..."]]:
    return [jax.lax.slice_in_dim(x, repeat, repeat + 1) for repeat in range(x.shape[0])]


def _separate_experts(moe: MoE, release: bool) -> None:
    """Replace the stacked experts (1, E, …) of a layer by one array (1, …) for each matrix of each expert."""
    stacked = moe.experts()
    assert isinstance(stacked, ExpertWeights)
    gate = stacked.gate.weight
    assert not isinstance(gate, InStack)  # outside of the loop over layers
    if any(isinstance(matrix.weight, Quantized) for matrix in stacked) or isinstance(gate, Quantized):
        return
    count = gate.shape[1]
    is_split = any(axis_size(axis) > 1 for axis in ("expert", "fsdp", "tensor"))
    if is_split or count > MAX_EXPERTS or gate.nbytes // count < MIN_EXPERT_BYTES:
        return
    leaves, structure = jax.tree.flatten(stacked)
    by_expert = []
    for leaf in leaves:
        by_expert.append(_experts(leaf))
        if release:
            leaf.delete()
    experts = tuple(jax.tree.unflatten(structure, expert) for expert in zip(*by_expert, strict=True))
    moe.separate_experts = nnx.data(SeparateExperts(experts))
    for linear in (moe.gate_proj, moe.up_proj, moe.down_proj):
        linear.weight = nnx.data(None)  # type: ignore[arg-type]  # a separated model is for decoding, which reads no stack
        linear.lora_a = nnx.data(None)
        linear.lora_b = nnx.data(None)


@jax.jit
def _experts(x_1Ewn: Shaped[Array, "1 E ..."]) -> list[Shaped[Array, "1 ..."]]:
    spec = spec_of(x_1Ewn)
    # The axis `expert` has a single device; a slice of a dim that it splits would have no sharding.
    whole = jax.sharding.reshard(x_1Ewn, P(spec[0], None, *spec[2:]))
    return [jax.lax.index_in_dim(whole, expert, 1, keepdims=False) for expert in range(whole.shape[1])]
