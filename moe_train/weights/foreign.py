"""Other people's models, whatever their layout: from disk into sharded arrays."""

from __future__ import annotations

from pathlib import Path

from moe_train import config
from moe_train.weights import hf, names, on_disk
from moe_train.weights.arrays import Abstract, Parameters, fill
from moe_train.weights.on_disk import Weights


def open_weights(path: str | Path) -> Weights:
    """The model at `path`, a Hugging Face directory.

    Raises FileNotFoundError where there is none, ValueError where it is damaged or of an architecture not built here.
    """
    return hf.open_weights(path)


def read_model(path: str | Path) -> config.Model:
    """The architecture of the model at `path`."""
    return hf.read_model_config(path)


def load_parameters(path: str | Path, abstract: Abstract) -> Parameters:
    """The weights of a model as arrays of the shapes, dtypes and shardings of `abstract` ({path: …}).

    `abstract` may name some of the weights; adapters are in no such model. The host holds one device's part of one
    array at a time. Raises ValueError unless the tensors are those of the architecture and fill every array.
    """
    found = open_weights(path)
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    names.check(path, found.table, shapes, {path: like.shape for path, like in abstract.items()})
    return fill(abstract, found.table, found.tensors)


def hashes(path: str | Path) -> dict[str, str]:
    """sha256 of each tensor that `load_parameters` reads, by its name in the files."""
    return on_disk.hashes(open_weights(path).tensors)
