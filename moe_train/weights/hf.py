"""Hugging Face models: from a directory into sharded arrays, and from arrays into a new directory."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding

from moe_train.weights import names, safetensors_io
from moe_train.weights.hf_config import read_model_config

Parameters = dict[str, jax.Array]
Ranges = tuple[tuple[int, int], ...]


def load_parameters(directory: str | Path, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> Parameters:
    """The weights of a model's directory as arrays of the shapes, dtypes and shardings of `abstract` ({path: …}).

    Adapters are in no such directory: leave their paths out of `abstract`. Each device's part of each array is read
    on its own; the host holds one such part at a time. Raises ValueError unless every tensor is used and every
    array filled.
    """
    tensors = open_tensors(directory)
    table = names.pieces_of(read_model_config(directory), tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    names.check(directory, table, shapes, {path: a.shape for path, a in abstract.items()})
    by_path: dict[str, dict[tuple[int, ...], names.Piece]] = {}
    for piece in table:
        by_path.setdefault(piece.path, {})[piece.lead] = piece
    with ThreadPoolExecutor() as pool:
        return {path: _array(like, by_path[path], tensors, pool) for path, like in abstract.items()}


def open_tensors(directory: str | Path) -> dict[str, safetensors_io.Tensor]:
    """The tensors of the text model, those that hold no weight of it left out."""
    found = safetensors_io.open_model(directory)
    return {name: tensor for name, tensor in found.items() if not any(part in name for part in names.IGNORED)}


def hashes(directory: str | Path) -> dict[str, str]:
    """sha256 of each tensor that `load_parameters` reads, by its name in the files."""
    return safetensors_io.hashes(open_tensors(directory))


def _array(
    like: jax.ShapeDtypeStruct,
    pieces: Mapping[tuple[int, ...], names.Piece],
    tensors: Mapping[str, safetensors_io.Tensor],
    pool: ThreadPoolExecutor,
) -> jax.Array:
    sharding = like.sharding
    assert isinstance(sharding, NamedSharding)
    sharding = NamedSharding(jax.sharding.get_mesh(), sharding.spec)  # an abstract mesh has no devices
    lead_dims = len(next(iter(pieces)))
    parts: dict[jax.Device, jax.Array] = {}
    by_index: dict[Ranges, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(like.shape).items():
        ranges = tuple(cut.indices(size)[:2] for cut, size in zip(index, like.shape, strict=True))
        by_index.setdefault(ranges, []).append(device)
    for ranges, devices in by_index.items():
        part = np.empty([stop - start for start, stop in ranges], like.dtype)
        lead, rest = ranges[:lead_dims], ranges[lead_dims:]

        def fill(at: tuple[int, ...], part: np.ndarray = part, lead: Ranges = lead, rest: Ranges = rest) -> None:
            piece = pieces[at]
            part[tuple(i - start for i, (start, _) in zip(at, lead, strict=True))] = piece.from_file(tensors[piece.name].read, rest)

        list(pool.map(fill, itertools.product(*(range(start, stop) for start, stop in lead))))
        for device in devices:
            parts[device] = jax.device_put(part, device)
        jax.block_until_ready([parts[device] for device in devices])
    return jax.make_array_from_single_device_arrays(like.shape, sharding, [parts[d] for d in sharding.addressable_devices])
