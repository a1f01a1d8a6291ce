"""A checkpoint's arrays on disk: saved in chunks, read in parts, and verified by bit sums.

Orbax by itself reads an array in one piece, and holds it twice while it does. It also accepts a flipped bit, or a missing
chunk (which reads as zeros), as valid data; the bit sums detect both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import NamedSharding

from moe_train.machine.mesh import platform

CHECKPOINT_CHUNK_BYTES = 2**25
"""Bytes per stored chunk, and per read. Without this setting, Orbax stores an array, or a device's shard of it, in one piece."""


def chunked_save_args(tree: Any) -> Any:
    """Return Orbax save arguments that allow reading a part of an array without the rest.

    Arrays are stored in chunks of `CHECKPOINT_CHUNK_BYTES`; large stacked arrays get separate chunks for each layer (first dim).
    """

    def save_args(x: jax.Array) -> ocp.SaveArgs:
        large = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize > CHECKPOINT_CHUNK_BYTES
        return ocp.SaveArgs(chunk_byte_size=CHECKPOINT_CHUNK_BYTES, shard_axes=(0,) if large and x.ndim > 2 else ())

    return jax.tree.map(save_args, tree)


def bit_sums(tree: Any) -> list[int]:
    """Compute, for each array, the sum of its elements' bits modulo 2^32; the result does not depend on the mesh."""
    arrays = jax.tree.leaves(tree)
    if platform() == "cpu" and all(x.is_fully_addressable for x in arrays):  # XLA:CPU would first widen the whole array
        return [sum(_bit_sum(np.asarray(s.data)) for s in x.addressable_shards if s.replica_id == 0) % 2**32 for x in arrays]
    return [int(x) for x in jax.device_get(_bit_sums(arrays))]


def _bit_sum(x: np.ndarray) -> int:
    """Sum the bits of one array with numpy, modulo 2^32."""
    return int(np.sum(x.view(_BITS[x.itemsize]), dtype=np.uint32))


_BITS = {2: np.uint16, 4: np.uint32}
"""The unsigned integer type for each item size in bytes."""


@jax.jit
def _bit_sums(arrays: list[jax.Array]) -> list[jax.Array]:
    """Sum the bits of each array on the devices; uint32 addition wraps modulo 2^32."""
    return [jnp.sum(jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]), dtype=jnp.uint32) for x in arrays]


def read_in_parts(params: Path, path: str, like: jax.ShapeDtypeStruct) -> Iterator[tuple[int, jax.Array]]:
    """Read an array of a checkpoint in parts along its first dim, each with as many entries as a stored chunk.

    Args:
        params: The checkpoint's folder of arrays.
        path: Path of the array.
        like: The expected shape, and the sharding of the parts.

    Yields:
        The index of the part's first entry, and the part.

    Raises:
        ValueError: If the stored array has another shape than `like`.
    """
    kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{params.absolute()}/"}, "path": f"{path}/"}
    stored = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()
    if stored.shape != like.shape:
        raise ValueError(f"{path} has the shape {stored.shape}, not {like.shape}")
    assert isinstance(like.sharding, NamedSharding)
    length = stored.shape[0]
    split = (*like.sharding.spec, None)[0]
    chunk_shape = stored.chunk_layout.read_chunk.shape
    # An array whose first dim is sharded over devices, or that is stored as one chunk, is read at once.
    step = length if split or chunk_shape is None else chunk_shape[0] or length
    for start in range(0, length, step):
        part = stored[tensorstore.d[0][start : min(start + step, length)].translate_to[0]]
        yield start, jax.make_array_from_callback(part.shape, like.sharding, partial(_read, part))


def _read(stored: tensorstore.TensorStore, index: Any) -> np.ndarray:
    """Read the index range `index` of a stored array."""
    return np.asarray(stored[index].read().result())


def add_part(whole: jax.Array | None, part: jax.Array, start: int, length: int) -> jax.Array:
    """Write a part into the array that collects the parts.

    Args:
        whole: The array so far, whose memory is reused (donated); None for zeros.
        part: The entries to write.
        start: Index of the first entry on the first dim.
        length: Size of the first dim of the complete array.

    Returns:
        The array with the part; `part` itself if it is complete.
    """
    if len(part) == length:
        return part
    if whole is None:
        whole = jnp.zeros((length, *part.shape[1:]), part.dtype, device=part.sharding)
    return _put(whole, part, start)


@partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, part: jax.Array, start: int) -> jax.Array:
    """Write `part` at entry `start` of `whole`, in place."""
    return jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0)
