"""A tensor that the files of an export must have, and how the model's matrices become it; for the proof alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from moe_train import config

ToFile = Callable[[np.ndarray], np.ndarray]
"""Turns a matrix of the model into the file's."""


class Part(NamedTuple):
    """One matrix or vector of the model inside a tensor of the file."""

    path: str
    lead: tuple[int, ...]
    """Entry in the stacked array: (), (repeat,) or (repeat, expert)."""
    to_file: ToFile
    """Turns the model's matrix into the file's. It also applies to B of an adapter, whose in dim is the rank."""
    mixes_factors: bool = False
    """Whether rows of the file's matrix are not outputs, so that `to_file` applies to the product of an adapter but not to B."""


class ExpectedTensor(NamedTuple):
    """A tensor that the file must have."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    """One part, or several stacked on the tensor's first dim."""

    @property
    def module(self) -> str:
        """Path of the module in the model, taken from the first part."""
        return self.parts[0].path.removesuffix(".weight")


def as_is(w: np.ndarray) -> np.ndarray:
    """Return the array unchanged."""
    return w


def outputs_last(w: np.ndarray) -> np.ndarray:
    """Turn (in, out dims…) into (out, in)."""
    return w.reshape(w.shape[0], -1).T


def outputs_one(w: np.ndarray) -> np.ndarray:
    """Turn (in dims…, out) into (out, in)."""
    return w.reshape(-1, w.shape[-1]).T


def interleaved(w: np.ndarray) -> np.ndarray:
    """Turn (in, heads, head_dim) into (out, in) with the two numbers of a rotary pair adjacent instead of half a head apart."""
    d, n, h = w.shape
    return outputs_last(w).reshape(n, 2, h // 2, d).transpose(0, 2, 1, 3).reshape(n * h, d)


def one(name: str, shape: tuple[int, ...], path: str, lead: tuple[int, ...], to_file: ToFile) -> ExpectedTensor:
    """Return a tensor that is a single matrix or vector of the model."""
    return ExpectedTensor(name, shape, (Part(path, lead, to_file),))


def layers_of(model: config.Model) -> Iterator[tuple[int, str, int]]:
    """Yield (layer, prefix of its paths, entry in their arrays); layer 5 of a period of 2 is entry 2 of `layers.1`.

    This is computed here rather than by the model's code: the second reader must not share the writer's assumptions about where
    layers are stored.
    """
    period = len(model.attention.windows)
    # The first dense layers of a sparse model are in a stack of their own.
    num_dense = 0
    if isinstance(model.ffn, config.MoeFfn) and model.ffn.dense_layers is not None:
        num_dense = model.ffn.dense_layers.count
    for layer in range(model.num_layers):
        is_second_stack = 0 < num_dense <= layer
        layer_of_stack = layer - num_dense if is_second_stack else layer
        entry, place = divmod(layer_of_stack, period)
        yield layer, f"stacks.{int(is_second_stack)}.layers.{place}.", entry
