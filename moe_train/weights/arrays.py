"""Between tensors of files and sharded arrays: one device's part at a time in, one matrix at a time out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train.model.quantize import Quantized, quantize_like
from moe_train.weights.names import Piece
from moe_train.weights.on_disk import Tensor

Parameters = dict[str, jax.Array]
Abstract = Mapping[str, jax.ShapeDtypeStruct]
Ranges = tuple[tuple[int, int], ...]


def fill(abstract: Abstract, table: Collection[Piece], tensors: Mapping[str, Tensor]) -> Parameters:
    """Arrays with the shapes, dtypes and shardings of `abstract`, read from `tensors` as `table` says.

    Each device's part is read on its own (no more of the file than that) and sent before the next is read. Quantised
    weights are so matrix by matrix, as they are read. `names.check` has found the three to fit. The mesh in force is the
    one of the shardings.
    """
    filled = {}
    by_path: dict[str, dict[tuple[int, ...], Piece]] = {}
    for piece in table:
        by_path.setdefault(piece.path, {})[piece.lead] = piece
    with ThreadPoolExecutor() as pool:
        for path, like in abstract.items():
            weight, _, part = path.rpartition(".")
            if part == "codes":
                both = Quantized(like, abstract[f"{weight}.scales"])
                arrays = _arrays(both.shape, both, partial(quantize_like, like=both), by_path[weight], tensors, pool)
                filled |= {path: arrays[0], f"{weight}.scales": arrays[1]}
            elif part != "scales":
                (filled[path],) = _arrays(like.shape, [like], lambda w: (w,), by_path[path], tensors, pool)
    return filled


def _arrays(
    shape: tuple[int, ...],
    likes: Sequence[jax.ShapeDtypeStruct],
    convert: Callable[[np.ndarray], tuple[np.ndarray, ...]],
    pieces: Mapping[tuple[int, ...], Piece],
    tensors: Mapping[str, Tensor],
    pool: ThreadPoolExecutor,
) -> list[jax.Array]:
    """The arrays, all split alike, that `convert` makes of a weight of this shape."""
    spec = likes[0].sharding
    assert isinstance(spec, NamedSharding), likes
    sharding = NamedSharding(jax.sharding.get_mesh(), spec.spec)  # that of `likes` may be of an abstract mesh
    replicas: dict[Ranges, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        ranges = tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))
        replicas.setdefault(ranges, []).append(device)
    parts: list[list[jax.Array]] = [[] for _ in likes]
    for ranges, devices in replicas.items():
        hosts = [np.empty(sharding.shard_shape(like.shape), like.dtype) for like in likes]
        _read(hosts, ranges, convert, pieces, tensors, pool)
        for host, sent in zip(hosts, parts, strict=True):
            sent += [jax.device_put(host, device) for device in devices]
        jax.block_until_ready(parts)  # the host's copy goes before the next one comes
    return [jax.make_array_from_single_device_arrays(like.shape, sharding, sent) for like, sent in zip(likes, parts, strict=True)]


def _read(
    parts: Sequence[np.ndarray],
    ranges: Ranges,
    convert: Callable[[np.ndarray], tuple[np.ndarray, ...]],
    pieces: Mapping[tuple[int, ...], Piece],
    tensors: Mapping[str, Tensor],
    pool: ThreadPoolExecutor,
) -> None:
    """Fill `parts` with what `convert` makes of the entries `ranges` of a stacked weight."""
    stacked = len(next(iter(pieces)))

    def read(lead: tuple[int, ...]) -> None:
        piece = pieces[lead]
        here = tuple(i - start for i, (start, _) in zip(lead, ranges, strict=False))
        for part, x in zip(parts, convert(piece.from_file(tensors[piece.name].read, ranges[stacked:])), strict=True):
            part[here] = x

    list(pool.map(read, itertools.product(*(range(*r) for r in ranges[:stacked]))))


def fetch(array: jax.Array, lead: tuple[int, ...] = ()) -> np.ndarray:
    """Entry `lead` of a stacked array, on the host; a view where a CPU device holds all of it.

    An array that is spread over several processes is gathered, so all of them have to ask for the same at a time.
    """
    if not array.is_fully_addressable:
        return np.asarray(_entry(array, lead))
    whole = None
    for shard in array.addressable_shards:
        cuts = [cut.indices(size)[:2] for cut, size in zip(shard.index, array.shape, strict=True)]
        if shard.replica_id == 0 and all(start <= i < stop for i, (start, stop) in zip(lead, cuts, strict=False)):
            part = _entry_of_shard(shard, tuple(i - start for i, (start, _) in zip(lead, cuts, strict=False)))
            if part.shape == array.shape[len(lead) :]:
                return part
            whole = np.empty(array.shape[len(lead) :], array.dtype) if whole is None else whole
            whole[shard.index[len(lead) :]] = part
    assert whole is not None
    return whole


def _entry_of_shard(shard: Any, lead: tuple[int, ...]) -> np.ndarray:
    if shard.device.platform == "cpu":
        return np.asarray(shard.data)[lead]  # the device's memory is the host's
    # cut on the device, as an array of a mesh of this device alone; the one in force has others
    mesh = Mesh(np.array([shard.device]), ("here",))
    with jax.set_mesh(mesh):
        part = jax.make_array_from_single_device_arrays(shard.data.shape, NamedSharding(mesh, P()), [shard.data])
        return np.asarray(part[lead])


@jax.jit
def _entry(array: jax.Array, lead: tuple[int, ...]) -> jax.Array:
    """Whole on every device."""
    for i in lead:
        array = jax.lax.dynamic_index_in_dim(array, i, keepdims=False)
    return jax.sharding.reshard(array, P())
