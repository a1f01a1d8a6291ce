"""A checkpoint's arrays on disk: saved in chunks, read in parts, and checked by the sums of their bits.

Orbax reads an array whole, and holds it twice then; and it takes a flipped bit, or a missing part (as zeros), for a value.
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

CHUNK = 2**25
"""Bytes that lie together, and are read at a time: Orbax alone would keep an array, or a device's part of it, in one piece."""


def in_chunks(tree: Any) -> Any:
    """How to save arrays so that a part can be read without the rest: of large stacked ones each layer on its own."""

    def one(x: jax.Array) -> ocp.SaveArgs:
        large = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize > CHUNK
        return ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=(0,) if large and x.ndim > 2 else ())

    return jax.tree.map(one, tree)


def bit_sums(tree: Any) -> list[int]:
    """Of each array the sum of its elements' bits modulo 2^32, on any mesh the same."""
    arrays = jax.tree.leaves(tree)
    if platform() == "cpu" and all(x.is_fully_addressable for x in arrays):  # XLA:CPU would widen a whole array first
        return [sum(_bit_sum(np.asarray(s.data)) for s in x.addressable_shards if s.replica_id == 0) % 2**32 for x in arrays]
    return [int(x) for x in jax.device_get(_bit_sums(arrays))]


def _bit_sum(x: np.ndarray) -> int:
    return int(np.sum(x.view(_BITS[x.itemsize]), dtype=np.uint32))


_BITS = {2: np.uint16, 4: np.uint32}


@jax.jit
def _bit_sums(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.sum(jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]), dtype=jnp.uint32) for x in arrays]


def parts(params: Path, path: str, like: jax.ShapeDtypeStruct) -> Iterator[tuple[int, jax.Array]]:
    """The array `path` of the folder `params`, in parts of its first dim, each of as many entries as lie together, and the
    entry that each starts with; sharded as `like`. Raises ValueError where it has another shape than `like`.
    """
    place = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{params.absolute()}/"}, "path": f"{path}/"}
    stored = tensorstore.open({"driver": "zarr", "kvstore": place}, open=True, read=True).result()
    if stored.shape != like.shape:
        raise ValueError(f"{path} has the shape {stored.shape}, not {like.shape}")
    assert isinstance(like.sharding, NamedSharding)
    (length, *_), (split, *_) = stored.shape, (*like.sharding.spec, None)
    together = stored.chunk_layout.read_chunk.shape
    step = length if split or together is None else together[0] or length
    for start in range(0, length, step):
        part = stored[tensorstore.d[0][start : min(start + step, length)].translate_to[0]]
        yield start, jax.make_array_from_callback(part.shape, like.sharding, partial(_read, part))


def _read(stored: tensorstore.TensorStore, at: Any) -> np.ndarray:
    return np.asarray(stored[at].read().result())


def joined(whole: jax.Array | None, part: jax.Array, start: int, length: int) -> jax.Array:
    """`whole` (None: zeros), whose first dim is `length`, with `part` at entry `start`; takes the memory of `whole`."""
    if len(part) == length:
        return part
    if whole is None:
        whole = jnp.zeros((length, *part.shape[1:]), part.dtype, device=part.sharding)
    return _put(whole, part, start)


@partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, part: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0)
