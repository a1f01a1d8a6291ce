"""The layer stacks of an architecture: groups of identical layers that are repeated and scanned together.

A stack is one period of layers, repeated. A model has one stack, or two if its first layers are dense and the others sparse.
The model, the file layouts and the memory plan all use this file to find which layer's weights are stored where.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moe_train.config.architecture import DenseFfn, Ffn, Model, MoeFfn


@dataclass(frozen=True)
class LayerStack:
    """One period of layers, repeated."""

    first_layer: int
    """Index of the stack's first layer in the whole model."""
    repeats: int
    """Number of times that the period is repeated."""
    windows: tuple[int | None, ...]
    """The attention window of each layer of the period; None for full attention."""
    ffn: Ffn
    """The feed-forward layer, the same in all layers of the stack."""

    @property
    def period(self) -> int:
        """Number of layers that are repeated together."""
        return len(self.windows)

    @property
    def num_layers(self) -> int:
        """Number of layers in the stack."""
        return self.repeats * self.period

    def layer(self, place: int, repeat: int) -> int:
        """Return the index, in the whole model, of the layer at position `place` of repetition `repeat` of the period."""
        return self.first_layer + repeat * self.period + place

    @property
    def is_sparse(self) -> bool:
        """Whether the layers have experts."""
        return isinstance(self.ffn, MoeFfn)


@dataclass(frozen=True)
class LayerPosition:
    """The location of a layer's weights: entry `repeat` of the arrays `stacks.{stack}.layers.{place}.…`."""

    layer: int
    """Index of the layer in the whole model."""
    stack: int
    """Index of the layer's stack."""
    place: int
    """Position of the layer in the period of the stack."""
    repeat: int
    """Repetition of the period: the index on the leading dim of the stacked arrays."""
    ffn: Ffn
    """The feed-forward layer."""


def stacks(model: Model) -> tuple[LayerStack, ...]:
    """Return the stacks of a model, in the order of its layers."""
    windows = model.attention.windows
    ffn = model.ffn
    dense = ffn.dense_layers if isinstance(ffn, MoeFfn) else None
    if dense is None:
        return (LayerStack(0, model.num_layers // len(windows), windows, ffn),)
    first = DenseFfn(name="dense", ffn_dim=dense.ffn_dim)
    num_sparse = model.num_layers - dense.count
    return (
        LayerStack(0, dense.count // len(windows), windows, first),
        LayerStack(dense.count, num_sparse // len(windows), windows, ffn),
    )


def layers(model: Model) -> Iterator[LayerPosition]:
    """Yield every layer in order, with the location of its weights."""
    for number, stack in enumerate(stacks(model)):
        for i in range(stack.num_layers):
            # Arrays are stacked over repetitions, so layers of one array are `period` layers apart.
            repeat, place = divmod(i, stack.period)
            yield LayerPosition(stack.layer(place, repeat), number, place, repeat, stack.ffn)


def sparse_layers(model: Model) -> list[int]:
    """Return the indices of the layers that have a router.

    Entry i of a model's router statistics belongs to layer `sparse_layers(model)[i]`.
    """
    return [position.layer for position in layers(model) if isinstance(position.ffn, MoeFfn)]
