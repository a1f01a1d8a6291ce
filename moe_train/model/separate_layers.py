"""A model whose layers are separate arrays: the fast form for decoding where slices of stacked weights are copies.

A scan over stacked layers slices the weights of one layer in each iteration. In training that copy is small beside the products
over thousands of tokens. Decoding multiplies each weight by a single token per sequence, so that on CPUs the copy costs more than
the product: 70% of the time of a token for a Mixtral of 4 layers.
"""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Shaped

from moe_train.model.transformer import Stack, Transformer


def separate_layers(transformer: Transformer, *, release: bool = False) -> Transformer:
    """Return the same model with one stack for each repeat of a period, so that no weight has to be sliced.

    Args:
        transformer: the model.
        release: delete each stacked array as soon as it has been separated, so that only one of them is in memory twice. The
            given model cannot be used afterwards.
    """
    separated = jax.tree.map(lambda x: x, transformer)  # a new object, whose attributes can be replaced
    separated.stacks = nnx.List([one for stack in transformer.stacks for one in _repeats(stack, release)])
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
    return [structure.unflatten(repeat) for repeat in zip(*slices, strict=True)]


@jax.jit
def _slices(x: Shaped[Array, "..."]) -> list[Shaped[Array, "..."]]:
    return [jax.lax.slice_in_dim(x, repeat, repeat + 1) for repeat in range(x.shape[0])]
