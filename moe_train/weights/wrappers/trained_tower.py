"""A tower and projector of a base whose weights were trained in part: trained tensors take the place of the base's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from moe_train import config
from moe_train.model.paths import ParameterPath
from moe_train.weights import merge
from moe_train.weights.arrays import LazyParameters
from moe_train.weights.names import WeightPiece
from moe_train.weights.on_disk import Carried, FileTensor, StoredTensor
from moe_train.weights.wrappers import encoders


class TrainedTensor(NamedTuple):
    """A tensor of a tower in the layout of its base, with trained values."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    piece: WeightPiece
    parameters: LazyParameters
    lora: config.Lora | None

    @property
    def file(self) -> object:
        """What takes the place of the file, for messages."""
        return "the trained weights"

    def read(self, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Return the part at `index`, with the adapter merged and rounded once; () is the whole tensor."""
        return self.piece.to_file(merge.merged(self.parameters, self.lora, self.piece, self.dtype))[index]


def tower_weights(parameters: LazyParameters) -> LazyParameters:
    """Return the weights of a tower and its projector among `parameters`."""
    return {path: x for path, x in parameters.items() if ParameterPath.parse(path).is_tower}


def with_trained(
    carried: Carried, model: config.Model, parameters: LazyParameters, lora: config.Lora | None, dtype: np.dtype
) -> Carried:
    """Return the parts around a text model with the trained tensors in place of the base's.

    Args:
        carried: the base's.
        model: the text model.
        parameters: all weights that were trained, those of the tower among them.
        lora: the section of the adapters, which are merged; None without any.
        dtype: dtype of the trained tensors.
    """
    weights = tower_weights(parameters)
    if not weights:
        return carried
    tensors: dict[str, StoredTensor] = dict(carried.tensors)
    for piece in encoders.pieces_of(carried, model):
        if piece.path in weights:
            tensors[piece.name] = TrainedTensor(piece.name, tensors[piece.name].shape, dtype, piece, weights, lora)
    return carried._replace(tensors=tensors)


def trained_names(tensors: Mapping[str, FileTensor]) -> list[str]:
    """Return the names of the trained tensors among those of a tower."""
    return [name for name, tensor in tensors.items() if isinstance(tensor, TrainedTensor)]
