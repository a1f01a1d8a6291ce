"""Move weights between tensors of files and sharded arrays, a part at a time in both directions."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train.model.parameters import Parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.quantize import Quantized, quantization_of, quantize
from moe_train.model.sharding.specs import spec_of
from moe_train.weights import strided
from moe_train.weights.fp8.tensor import Fp8Tensor
from moe_train.weights.names import WeightPiece
from moe_train.weights.on_disk import FileTensor, array_bytes

Abstract = Mapping[str, jax.ShapeDtypeStruct]
"""Shapes, dtypes and shardings by path."""
Ranges = tuple[tuple[int, int], ...]
"""(start, stop) of each dim."""
ReadMatrix = Callable[[tuple[int, ...], Sequence[np.ndarray]], None]
"""Reads a matrix, given its entry in the stacked dims, into host arrays: a single one, or quantized values and scales."""
READ_CHUNK_BYTES = 2**20
"""Bytes of a file that are read at a time."""
HUGE_PAGES_FROM_BYTES = 2**22
"""Size from which numpy asks the system for huge pages."""
MAX_STAGING_BYTES = 2**27
"""Bytes of weights that are on the host at a time on their way to an accelerator, unless a single matrix is larger."""
_DEVICE_AXIS = "device"
"""The only axis of a mesh of one device."""


class LazyArray(NamedTuple):
    """An array whose content stays in files and is read a matrix or a layer at a time."""

    like: jax.ShapeDtypeStruct
    """Shape, dtype and sharding of the array."""
    pieces: Mapping[tuple[int, ...], WeightPiece]
    """The piece of each entry in the stacked dims."""
    tensors: Mapping[str, FileTensor]
    """Tensors of the files by name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.like.shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype that values are cast to when they are read."""
        return self.like.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.like.size

    def entry(self, lead: tuple[int, ...]) -> np.ndarray:
        """Read the matrix with this entry in the stacked dims."""
        piece = self.pieces[lead]
        return piece.from_file(self.tensors[piece.name].read).astype(self.dtype, copy=False)

    def layers(self, first: int) -> LazyArray:
        """Return entry `first` of the first dim, which is kept with size 1; nothing is read."""
        like = jax.ShapeDtypeStruct((1, *self.shape[1:]), self.dtype, sharding=self.like.sharding)
        pieces: dict[tuple[int, ...], WeightPiece] = {}
        for lead, piece in self.pieces.items():
            if lead[0] == first:
                pieces[(0, *lead[1:])] = piece
        return LazyArray(like, pieces, self.tensors)


LazyParameters = Mapping[str, jax.Array | LazyArray]
"""Weights by path, in memory or in files."""


def open_lazily(abstract: Abstract, table: Collection[WeightPiece], tensors: Mapping[str, FileTensor]) -> dict[str, LazyArray]:
    """Return lazy arrays: like `fill`, but nothing is read yet. `abstract` must not contain quantized weights."""
    by_path = _group_by_path(table)
    return {path: LazyArray(like, by_path[path], tensors) for path, like in abstract.items()}


def read_lazy(weights: LazyParameters) -> Parameters:
    """Read the lazy arrays among `weights` into memory."""
    loaded: Parameters = {}
    with ThreadPoolExecutor() as pool:
        for path, x in weights.items():
            if isinstance(x, LazyArray):
                (loaded[path],) = _arrays(x.shape, [x.like], x.pieces, x.tensors, pool)
            else:
                loaded[path] = x
    return loaded


def _group_by_path(table: Collection[WeightPiece]) -> dict[str, dict[tuple[int, ...], WeightPiece]]:
    """Return the pieces of each parameter, by their entry in the stacked dims."""
    by_path: dict[str, dict[tuple[int, ...], WeightPiece]] = {}
    for piece in table:
        by_path.setdefault(piece.path, {})[piece.lead] = piece
    return by_path


def fill(abstract: Abstract, table: Collection[WeightPiece], tensors: Mapping[str, FileTensor]) -> Parameters:
    """Read arrays with the shapes, dtypes and shardings of `abstract` from files.

    Each device's part is read separately, and nothing else of the files: onto an accelerator matrix by matrix, or, if the
    device's memory is the host's, directly into it. Weights are quantized while they are read, about a MiB of the file at a
    time. The mesh in force must be the one of the shardings.

    Args:
        abstract: the arrays to fill, by path.
        table: where each matrix is in the files.
        tensors: tensors of the files by name. `names.check_file_tensors` must have accepted the combination.
    """
    filled: Parameters = {}
    by_path = _group_by_path(table)
    with ThreadPoolExecutor() as pool:
        for path, like in abstract.items():
            parsed = ParameterPath.parse(path)
            # Files hold no quantized weights, so the table has the weight's own path, without the part.
            if parsed.part == "codes":
                scales = f"{parsed.weight}.scales"
                quantized = Quantized(like, abstract[scales])
                arrays = _arrays(quantized.shape, quantized, by_path[parsed.weight], tensors, pool)
                filled |= {path: arrays[0], scales: arrays[1]}
            elif parsed.part != "scales":  # scales were filled together with their quantized values
                (filled[path],) = _arrays(like.shape, [like], by_path[path], tensors, pool)
    return filled


def _arrays(
    shape: tuple[int, ...],
    likes: Sequence[jax.ShapeDtypeStruct] | Quantized,
    pieces: Mapping[tuple[int, ...], WeightPiece],
    tensors: Mapping[str, FileTensor],
    pool: ThreadPoolExecutor,
) -> list[jax.Array]:
    """Read the weight of this shape as one array, or as its quantized values and scales, both sharded alike."""
    spec = likes[0].sharding
    assert isinstance(spec, NamedSharding), likes
    sharding = NamedSharding(jax.sharding.get_mesh(), spec.spec)  # the mesh of `likes` may be abstract
    # Devices that hold the same part are grouped, so that the part is read once for all of them.
    replicas: dict[Ranges, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        replicas.setdefault(_ranges(index or (), shape), []).append(device)
    # Leading dims that no matrix in the files has: repeats of the period, and experts.
    stacked = len(next(iter(pieces)))
    shards = [jax.ShapeDtypeStruct(sharding.shard_shape(like.shape), like.dtype) for like in likes]
    parts: list[list[jax.Array]] = [[] for _ in likes]
    for ranges, devices in replicas.items():
        # `ranges` is bound as a default, since the function is called by threads.
        def read(lead: tuple[int, ...], outs: Sequence[np.ndarray], ranges: Ranges = ranges) -> None:
            """Read this part of one matrix into `outs`, and quantize it on the way if the weight is quantized."""
            piece = pieces[lead]
            tensor = tensors[piece.name]
            blocks_along = likes.dim if isinstance(likes, Quantized) else None
            for region, cut in _cuts(piece, tensor, ranges[stacked:], blocks_along):
                if not isinstance(likes, Quantized):
                    strided.copy_into(outs[0][region], piece.from_file(tensor.read, cut))
                    continue
                quantized = _read_quantized(piece, tensor, cut, likes)
                for out, x in zip(outs, quantized, strict=True):
                    out[region] = x

        put = _put_in_place if _is_host(devices[0]) else _put_one_by_one
        for device_arrays, new_arrays in zip(parts, put(ranges[:stacked], shards, devices, read, pool), strict=True):
            device_arrays += new_arrays
    return [
        jax.make_array_from_single_device_arrays(like.shape, sharding, device_arrays)
        for like, device_arrays in zip(likes, parts, strict=True)
    ]


def _read_quantized(piece: WeightPiece, tensor: FileTensor, cut: Ranges, like: Quantized) -> Sequence[np.ndarray | jax.Array]:
    """Read a cut of a matrix as quantized values and scales; FP8 files keep theirs where they fit the blocks of `like`."""
    kind, block_size, dtype, dim = quantization_of(like)
    if kind == "fp8" and isinstance(tensor, Fp8Tensor) and tensor.has_scales_of(block_size):
        scales = piece.from_file(tensor.read_scale_of_each, cut)
        first_of_block = [slice(None)] * scales.ndim
        first_of_block[dim] = slice(None, None, block_size)
        codes = piece.from_file(tensor.read_code_of_each, cut)
        return codes.view(like.codes.dtype), scales[tuple(first_of_block)].view(like.scales.dtype)
    return _quantized(strided.contiguous(piece.from_file(tensor.read, cut)), kind, block_size, dtype, dim)


def _ranges(index: tuple[slice, ...], shape: tuple[int, ...]) -> Ranges:
    """Return the (start, stop) of each dim that an index selects; dims without an entry are complete."""
    cuts = [*index, *(slice(None) for _ in shape[len(index) :])]
    return tuple(cut.indices(size)[:2] for cut, size in zip(cuts, shape, strict=True))


def _is_host(device: jax.Device) -> bool:
    """Return whether the device's memory is the host's."""
    return device.platform == "cpu"


def _put_in_place(
    lead_ranges: Ranges,
    shards: Sequence[jax.ShapeDtypeStruct],
    devices: Sequence[jax.Device],
    read: ReadMatrix,
    pool: ThreadPoolExecutor,
) -> list[list[jax.Array]]:
    """Read each of `shards` into host memory that the devices then use directly; returns one array per device for each."""
    hosts = [_aligned(shard.shape, shard.dtype) for shard in shards]

    def read_matrix(lead: tuple[int, ...]) -> None:
        """Read one matrix to its place in the host's arrays."""
        # The host's arrays hold only this part of the stacked dims, so positions count from its start.
        position = tuple(i - start for i, (start, _) in zip(lead, lead_ranges, strict=True))
        read(lead, [host[position] for host in hosts])

    # Exhausted, since a thread's error is raised only where its result is taken.
    list(pool.map(read_matrix, _leads(lead_ranges)))
    return [[jax.device_put(host, device) for device in devices] for host in hosts]


def _put_one_by_one(
    lead_ranges: Ranges,
    shards: Sequence[jax.ShapeDtypeStruct],
    devices: Sequence[jax.Device],
    read: ReadMatrix,
    pool: ThreadPoolExecutor,
) -> list[list[jax.Array]]:
    """Like `_put_in_place`, for accelerators: a few matrices are on the host at a time."""
    stacked = len(lead_ranges)

    def read_matrix(lead: tuple[int, ...]) -> list[np.ndarray]:
        """Read one matrix into new host arrays, whose stacked dims have size 1."""
        hosts = [np.empty((1,) * stacked + shard.shape[stacked:], shard.dtype) for shard in shards]
        read(lead, [host[(0,) * stacked] for host in hosts])
        return hosts

    leads = list(_leads(lead_ranges))
    # One mesh per device, since the mesh in force would spread each array over all of its devices.
    meshes = [Mesh(np.array([device]), (_DEVICE_AXIS,)) for device in devices]
    buffers: list[list[jax.Array]] = [[] for _ in shards]
    for per_device, shard in zip(buffers, shards, strict=True):
        for mesh in meshes:
            with jax.set_mesh(mesh):
                per_device.append(jax.jit(partial(jnp.zeros, shard.shape, shard.dtype), out_shardings=NamedSharding(mesh, P()))())
    entry_bytes = sum(shard.size // len(leads) * shard.dtype.itemsize for shard in shards)
    window = max(1, MAX_STAGING_BYTES // max(1, entry_bytes))
    for start in range(0, len(leads), window):
        batch = leads[start : start + window]
        for lead, hosts in zip(batch, pool.map(read_matrix, batch), strict=True):
            position = [i - first for i, (first, _) in zip(lead, lead_ranges, strict=True)]
            for per_device, host in zip(buffers, hosts, strict=True):
                # An argument of the compiled program, so that one program serves every position.
                start_indices = np.array(position + [0] * (host.ndim - stacked), np.int32)
                for i, mesh in enumerate(meshes):
                    with jax.set_mesh(mesh):
                        per_device[i] = _place(per_device[i], jax.device_put(host, NamedSharding(mesh, P())), start_indices)
        jax.block_until_ready(buffers)  # frees the host's copies before the next ones are read
    return [[buffer.addressable_data(0) for buffer in per_device] for per_device in buffers]


@partial(jax.jit, donate_argnums=0)
def _place(buffer: jax.Array, entry: jax.Array, start_indices: jax.Array) -> jax.Array:
    """Write `entry` into `buffer`, in place."""
    return jax.lax.dynamic_update_slice(buffer, entry, tuple(start_indices))


def _leads(ranges: Ranges) -> Iterator[tuple[int, ...]]:
    """Yield every index within the ranges of the stacked dims; () once if there are none."""
    return itertools.product(*(range(*r) for r in ranges))


def _cuts(
    piece: WeightPiece, tensor: FileTensor, ranges: Ranges, uncut_dim: int | None = None
) -> Iterator[tuple[tuple[slice, ...], Ranges]]:
    """Split the entries `ranges` of a matrix into cuts of about a MiB of the file.

    Args:
        piece: the matrix.
        tensor: its tensor in the file.
        ranges: (start, stop) of each of our dims.
        uncut_dim: a dim, counted from the end, that is not cut; None if any may be.

    Yields:
        (where the cut lies within the entries, the ranges of the cut).
    """
    rows = piece.axes.index((0,))  # our dim that runs over rows of the file
    start, stop = ranges[rows]
    row_bytes = array_bytes([stop - start for start, stop in ranges], tensor.dtype) // max(1, stop - start)
    step = max(1, READ_CHUNK_BYTES // max(1, row_bytes))
    # Blocks of values that share a scale lie along this dim. A cut could split one, and `region` would not fit the scales.
    if uncut_dim is not None and rows == len(ranges) + uncut_dim:
        step = max(1, stop - start)
    for first in range(start, stop, step):
        end = min(first + step, stop)
        region = (slice(None),) * rows + (slice(first - start, end - start),)
        yield region, (*ranges[:rows], (first, end), *ranges[rows + 1 :])


_quantized = jax.jit(quantize, static_argnums=(1, 2, 3, 4))
"""Quantizes on this process's first device, even if that is the host: a few times as fast as numpy."""


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Allocate memory that XLA:CPU uses as an array's own, without a copy.

    Large memory comes directly from the system, with its ordinary pages and populated at once. Huge pages, which numpy asks for,
    take a virtual machine seconds per GiB, since its host has reclaimed exactly the pages that were free.
    """
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size >= HUGE_PAGES_FROM_BYTES and hasattr(mmap, "MAP_POPULATE"):  # Linux
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        return np.frombuffer(pages, dtype).reshape(shape)
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64  # XLA:CPU copies arrays that are not aligned to 64 bytes
    return memory[start : start + size].view(dtype).reshape(shape)


def fetch_entry(array: jax.Array | LazyArray, lead: tuple[int, ...] = ()) -> np.ndarray:
    """Return entry `lead` of a stacked array on the host; a view if a CPU device holds all of it.

    An array that is spread over several processes is gathered, so all of them must ask for the same entries in the same order.
    """
    if isinstance(array, LazyArray):
        return array.entry(lead)
    if not array.is_fully_addressable:
        return np.asarray(_entry(array, lead))
    entry_shape = array.shape[len(lead) :]
    entry: np.ndarray | None = None
    for shard in array.addressable_shards:
        cuts = [range(*cut.indices(size)) for cut, size in zip(shard.index, array.shape, strict=True)]
        # Replicas hold the same part, so one of each is enough; `lead` covers only the stacked dims.
        if shard.replica_id == 0 and all(i in cut for i, cut in zip(lead, cuts, strict=False)):
            part = _entry_of_shard(shard, tuple(i - cut.start for i, cut in zip(lead, cuts, strict=False)))
            if part.shape == entry_shape:
                return part
            if entry is None:
                entry = np.empty(entry_shape, array.dtype)
            entry[shard.index[len(lead) :]] = part
    assert entry is not None, lead
    return entry


def _entry_of_shard(shard: jax.Shard, lead: tuple[int, ...]) -> np.ndarray:
    """Return the part of an entry that one device holds, on the host."""
    if shard.device.platform == "cpu":
        return np.asarray(shard.data)[lead]  # a view, since the device's memory is the host's
    # Sliced on the device, as an array of a one-device mesh, since the mesh in force has other devices.
    mesh = Mesh(np.array([shard.device]), (_DEVICE_AXIS,))
    with jax.set_mesh(mesh):
        part = jax.make_array_from_single_device_arrays(shard.data.shape, NamedSharding(mesh, P()), [shard.data])
        return np.asarray(part[lead])


@jax.jit
def _entry(array: jax.Array, lead: tuple[jax.Array, ...]) -> jax.Array:
    """Return the entry replicated on every device, bit for bit."""
    # As integers, since adding zeros to floats could change negative zeros and NaNs.
    bits = jax.lax.bitcast_convert_type(array, {2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize])
    for i in lead:
        if spec_of(bits)[0] is None:
            bits = jax.lax.dynamic_index_in_dim(bits, i, keepdims=False)
        else:
            # Indexing a sharded dim would gather all of it. A masked sum moves a single entry: other devices contribute zeros.
            is_entry = (jnp.arange(len(bits)) == i).reshape(-1, *(1,) * (bits.ndim - 1))
            bits = jnp.sum(jnp.where(is_entry, bits, 0), axis=0, dtype=bits.dtype)
    return jax.lax.bitcast_convert_type(jax.sharding.reshard(bits, P()), array.dtype)
