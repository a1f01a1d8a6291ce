"""The stacks of an architecture: which layers are alike, repeated and scanned together.

A stack is one period of layers, repeated. A model has one stack, or two where its first layers are dense and the others
sparse. Everything that has to know which layer's weights lie where (the model, the layouts, the plan) asks here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moe_train.config.architecture import DenseFfn, Ffn, Model, MoeFfn


@dataclass(frozen=True)
class LayerStack:
    """One period of layers, repeated."""

    first_layer: int
    """Its number in the whole model."""
    repeats: int
    windows: tuple[int | None, ...]
    """The attention window of each layer of the period; None for none."""
    ffn: Ffn
    """The feed-forward part of all its layers."""

    @property
    def period(self) -> int:
        """Number of layers that are repeated together."""
        return len(self.windows)

    @property
    def num_layers(self) -> int:
        return self.repeats * self.period

    def layer(self, place: int, repeat: int) -> int:
        """Number, in the whole model, of the layer at a place of a period."""
        return self.first_layer + repeat * self.period + place

    @property
    def is_sparse(self) -> bool:
        return isinstance(self.ffn, MoeFfn)


@dataclass(frozen=True)
class LayerPosition:
    """Where the weights of a layer are: entry `repeat` of the arrays `stacks.{stack}.layers.{place}.…`."""

    layer: int
    """Its number in the whole model."""
    stack: int
    place: int
    """Its place in the period of the stack."""
    repeat: int
    ffn: Ffn


def stacks(model: Model) -> tuple[LayerStack, ...]:
    """The stacks of a model, in the order of its layers."""
    windows, ffn = model.attention.windows, model.ffn
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
    """Every layer in order, with where its weights are."""
    for number, stack in enumerate(stacks(model)):
        for i in range(stack.num_layers):
            repeat, place = divmod(i, stack.period)
            yield LayerPosition(stack.layer(place, repeat), number, place, repeat, stack.ffn)


def sparse_layers(model: Model) -> list[int]:
    """Numbers of the layers that have a router: entry i of a model's router statistics is of layer `sparse_layers[i]`."""
    return [position.layer for position in layers(model) if isinstance(position.ffn, MoeFfn)]
