"""A checkpoint's arrays on disk: saved in chunks, read in parts, and verified by bit sums.

Orbax by itself reads an array in one piece, and holds it twice while it does. It also accepts a flipped bit, or a missing
chunk (which reads as zeros), as valid data; the bit sums detect both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from jax.sharding import NamedSharding

from moe_train.machine.mesh import platform

CHECKPOINT_CHUNK_BYTES = 2**25
"""Bytes per stored chunk, and per read. Without this setting, Orbax stores an array, or a device's shard of it, in one piece."""


def chunked_save_args(tree: Any) -> Any:
    """Return Orbax's save arguments for a pytree of arrays, with which a part of an array can be read without the rest.

    Arrays are stored in chunks of `CHECKPOINT_CHUNK_BYTES`; large stacked arrays get separate chunks for each layer (first dim).
    """
    # Imported here, since a fifth of a second goes into it, and models are read without it.
    import orbax.checkpoint as ocp

    def save_args(x: jax.Array) -> ocp.SaveArgs:
        """Return the save arguments of one array."""
        is_large = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize > CHECKPOINT_CHUNK_BYTES
        # Without shard_axes Orbax splits sharded and large dims first, so a chunk would contain parts of many layers.
        return ocp.SaveArgs(chunk_byte_size=CHECKPOINT_CHUNK_BYTES, shard_axes=(0,) if is_large and x.ndim > 2 else ())

    return jax.tree.map(save_args, tree)


def bit_sums(tree: Any) -> list[int]:
    """Compute, for each array, the sum of its elements' bits modulo 2^32; the result does not depend on the mesh."""
    arrays = jax.tree.leaves(tree)
    if platform() == "cpu" and all(x.is_fully_addressable for x in arrays):
        # On the host, since XLA:CPU would first convert the complete array to uint32.
        return [_bit_sum_on_host(x) for x in arrays]
    return [int(x) for x in jax.device_get(_bit_sums(arrays))]


def _bit_sum_on_host(array: jax.Array) -> int:
    """Sum the bits of an array that this process holds completely, with numpy."""
    total = 0
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            total += _bit_sum(np.asarray(shard.data))
    return total % 2**32


def _bit_sum(x: np.ndarray) -> int:
    """Sum the bits of a host array, modulo 2^32."""
    # Integer sums do not depend on their order, so any mesh gives the same one; uint32 wraps modulo 2^32.
    return int(np.sum(x.view(_BITS[x.itemsize]), dtype=np.uint32))


_BITS = {2: np.uint16, 4: np.uint32}
"""The unsigned integer type for each item size in bytes."""


@jax.jit
def _bit_sums(arrays: list[jax.Array]) -> list[jax.Array]:
    """Sum the bits of each array on the devices; uint32 addition wraps modulo 2^32."""
    return [jnp.sum(jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]), dtype=jnp.uint32) for x in arrays]


class StoredPart(NamedTuple):
    """A part of a stored array, on the devices."""

    start: int
    """Index of its first entry on the array's first dim."""
    array: jax.Array
    bit_sum: int
    """This process's share of the sum of the bits that were read; the shares of all processes add up to the array's bit sum."""


def stored_names(tree: Any) -> list[str]:
    """Return the names under which Orbax stores the leaves of a pytree, in the order of the leaves."""
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def read_array(item: Path, name: str, like: jax.ShapeDtypeStruct) -> StoredPart:
    """Read a complete array of a checkpoint; no process waits for another.

    Args:
        item: The checkpoint's folder of arrays.
        name: Name of the array.
        like: The expected shape, dtype and sharding.

    Raises:
        ValueError: If the stored array has another shape or dtype than `like`, or cannot be read.
    """
    stored = _open(item, name, like)
    if stored.dtype.numpy_dtype != like.dtype:
        raise ValueError(f"{name} is stored as {stored.dtype.name}, but {like.dtype} is expected")
    assert isinstance(like.sharding, NamedSharding)
    return _read_part(stored, 0, like.sharding)


def read_in_parts(params: Path, path: str, like: jax.ShapeDtypeStruct) -> Iterator[StoredPart]:
    """Read an array of a checkpoint in parts along its first dim, each with as many entries as a stored chunk.

    Args:
        params: The checkpoint's folder of arrays.
        path: Path of the array.
        like: The expected shape, and the sharding of the parts.

    Yields:
        The parts.

    Raises:
        ValueError: If the stored array has another shape than `like`, or cannot be read.
    """
    stored = _open(params, path, like)
    assert isinstance(like.sharding, NamedSharding)
    length = stored.shape[0]
    first_dim_is_sharded = bool(like.sharding.spec and like.sharding.spec[0])
    chunk_shape = stored.chunk_layout.read_chunk.shape
    step = length
    # A part of a sharded first dim would not divide over the devices, so such an array is read at once.
    if chunk_shape is not None and chunk_shape[0] and not first_dim_is_sharded:
        step = chunk_shape[0]
    for start in range(0, length, step):
        # TensorStore keeps a slice's position as its origin; the part has to begin at 0 for the indices of its shards.
        part = stored[tensorstore.d[0][start : min(start + step, length)].translate_to[0]]
        yield _read_part(part, start, like.sharding)


def _open(item: Path, name: str, like: jax.ShapeDtypeStruct) -> tensorstore.TensorStore:
    """Open a stored array. Raises ValueError if it is missing or has another shape than `like`."""
    # How Orbax stores arrays: as zarr, inside a database (OCDBT) that spans the item's folder.
    kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item.absolute()}/"}, "path": f"{name}/"}
    stored = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()
    if stored.shape != like.shape:
        raise ValueError(f"{name} is stored with shape {stored.shape}, but {like.shape} is expected")
    return stored


def _read_part(stored: tensorstore.TensorStore, start: int, sharding: NamedSharding) -> StoredPart:
    """Read this process's shards of a stored array, and sum the bits of those that no other device counts."""
    shards: dict[str, np.ndarray] = {}

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        """Read an index range once, for all devices that hold it."""
        # As text, since slices cannot be hashed before Python 3.12.
        key = str(index)
        # Replicas on this process ask for the same range.
        if key not in shards:
            shards[key] = np.asarray(stored[index].read().result())
        return shards[key]

    array = jax.make_array_from_callback(stored.shape, sharding, read)
    total = 0
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            total += _bit_sum(shards[str(shard.index)])
    return StoredPart(start, array, total)


def add_part(collected: jax.Array | None, part: jax.Array, start: int, length: int) -> jax.Array:
    """Write a part into the array that collects the parts.

    Args:
        collected: The array so far, whose memory is reused (donated); None for zeros.
        part: The entries to write.
        start: Index of the first entry on the first dim.
        length: Size of the first dim of the complete array.

    Returns:
        The array with the part; `part` itself if it is complete.
    """
    if len(part) == length:
        return part
    if collected is None:
        collected = jnp.zeros((length, *part.shape[1:]), part.dtype, device=part.sharding)
    return _put(collected, part, start)


@partial(jax.jit, donate_argnums=0)
def _put(collected: jax.Array, part: jax.Array, start: int) -> jax.Array:
    """Write `part` at entry `start` of `collected`, in place."""
    return jax.lax.dynamic_update_slice_in_dim(collected, part, start, 0)
