"""Agreement between the processes that hold a model together, over the mesh in force; a single process agrees with itself."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train.machine.files import new_directory
from moe_train.machine.mesh import AXES, wait_for_processes
from moe_train.model.parameters import Parameters
from moe_train.weights import on_disk
from moe_train.weights.arrays import LazyParameters, fetch_entry
from moe_train.weights.on_disk import FileTensor

T = TypeVar("T")

_MAX_TEXT_BYTES = 4096
"""Maximum length in bytes of a text that is sent."""


def is_first() -> bool:
    """Return whether this process writes what is written only once."""
    return jax.process_index() == 0


def all_agree(succeeded: bool) -> bool:
    """Return whether every process reports success; no process continues before all have answered."""
    if jax.process_count() == 1:
        return succeeded
    agreed = bool(_over_processes(np.array([succeeded], np.int32)).min())
    if not agreed:
        # A process that has failed ends now. If it did so before the others have read the answer, their collective would break.
        wait_for_processes()
    return agreed


def from_first(text: str) -> str:
    """Return the text that process 0 has."""
    if jax.process_count() == 1:
        return text
    # A collective needs the same shape in every process, so the text is padded with zeros.
    encoded = np.zeros(_MAX_TEXT_BYTES, np.int32)
    if is_first():
        text_bytes = np.frombuffer(text.encode(), np.uint8)
        encoded[: len(text_bytes)] = text_bytes
    (first, *_) = _over_processes(encoded)
    # The text ends at the last byte that is not zero.
    return bytes(first[: np.flatnonzero(first)[-1] + 1].astype(np.uint8)).decode()


# --- files that several processes write ----------------------------------------------------------------------------


@contextmanager
def one_directory(path: str | Path) -> Iterator[Path]:
    """Like `new_directory`, but shared: the first process creates the folder, and renames it after all have finished.

    Raises:
        ValueError: in all processes, if one of them does not see what the first one created.
    """
    with new_directory(path) if is_first() else nullcontext() as created:
        # Only the first process knows the folder's temporary name.
        directory = Path(from_first(str(created and created.absolute())))
        require_shared(directory)
        yield directory
    # The first process has renamed the folder by now. Nobody continues before that, and finds it missing.
    all_agree(True)


SEEN_WITHIN_SECONDS = 10.0
"""Seconds to wait for a new directory, which a network file system may show late."""


def require_shared(directory: Path) -> None:
    """Raise ValueError, in all processes, if one of them does not see a directory that the first process sees."""
    if jax.process_count() == 1:
        return
    deadline = time.monotonic() + SEEN_WITHIN_SECONDS
    is_visible = directory.is_dir()
    while not is_visible and time.monotonic() < deadline:
        time.sleep(0.1)
        is_visible = directory.is_dir()
    if not all_agree(is_visible):
        verb = "sees" if is_visible else "does not see"
        observation = f"process {jax.process_index()} on {platform.node()} {verb} {directory}"
        raise ValueError(f"{directory.parent} is not on a file system that all processes share: {observation}; choose one that is")


@contextmanager
def all_or_none() -> Iterator[None]:
    """Stop all processes at the end of the block if an error occurs in one of them."""
    fault: Exception | None = None
    try:
        yield
    except Exception as error:
        fault = error
    # Asked first, and in every process, since the answer is a collective.
    if not all_agree(fault is None) and fault is None:
        raise RuntimeError("another process could not write its part of the export; its own error gives the reason")
    if fault is not None:
        raise fault


def first_writes(parts: Iterator[T], write: Callable[[Iterator[T]], object]) -> None:
    """Let the first process write what all of them compute together, a part at a time.

    The other processes only compute. If writing fails, the first process still computes the remaining parts, since the others
    depend on its share of the computation; the error is raised at the end.
    """
    try:
        if is_first():
            write(parts)
    finally:
        for _ in parts:
            pass


def gather_on_each_process(parameters: LazyParameters) -> Parameters:
    """Return the same arrays, complete in each process on its first device; for few and small arrays, such as adapters."""
    mesh = Mesh(np.array(jax.local_devices()[:1]), ("device",))
    # A collective for arrays of several processes, so all of them need the same order of paths.
    on_host = {path: fetch_entry(array) for path, array in parameters.items()}
    with jax.set_mesh(mesh):
        return {path: jax.device_put(array, NamedSharding(mesh, P())) for path, array in on_host.items()}


def hash_in_shares(sizes: Mapping[str, int], hash_items: Callable[[list[str]], Mapping[str, str]]) -> dict[str, str]:
    """Return the sha256 of items that all processes see, by name; each process computes a share, and all get the result.

    Args:
        sizes: bytes by name. Largest first, each item goes to the process with the least work.
        hash_items: computes the hashes of the named items in this process.

    Raises:
        ValueError: in all processes, if they do not see the same names and sizes.
    """
    if jax.process_count() == 1:
        return dict(hash_items(list(sizes)))
    # A complete order, so that all processes compute the same assignment without exchanging it.
    names = sorted(sizes, key=lambda name: (-sizes[name], name))
    # A digest has one size however many names there are, so it fits a collective even where the names differ.
    names_digest = hashlib.sha256(repr([(name, sizes[name]) for name in names]).encode()).digest()
    digests_of_names = _over_processes(np.frombuffer(names_digest, np.int32))
    if (digests_of_names != digests_of_names[0]).any():
        raise ValueError(
            f"the processes do not see the same files under the names {names[0]}, …; place them on a file system that all share"
        )
    owner: dict[str, int] = {}
    loads = [0] * jax.process_count()
    for name in names:
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += sizes[name]
    own_hashes = hash_items([name for name in names if owner[name] == jax.process_index()])
    # Items of other processes are zero, so a bitwise OR combines the hashes of all processes.
    own_rows = [bytes.fromhex(own_hashes.get(name, "00" * 32)) for name in names]
    # As eight int32 each, since JAX has no 64-bit integers by default.
    digests = np.stack([np.frombuffer(row, np.int32) for row in own_rows])
    combined = np.bitwise_or.reduce(_over_processes(digests))
    return {name: row.tobytes().hex() for name, row in zip(names, combined, strict=True)}


def hash_tensors_in_shares(tensors: Mapping[str, FileTensor]) -> dict[str, str]:
    """Return `on_disk.hash_tensors` of files that all processes see, each reading a share; raises as `hash_in_shares` does."""
    sizes = {name: on_disk.array_bytes(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    return hash_in_shares(sizes, lambda names: on_disk.hash_tensors({name: tensors[name] for name in names}))


# --- between processes ---------------------------------------------------------------------------------------------


def _over_processes(own_row: np.ndarray) -> np.ndarray:
    """Return an array of every device's row, (devices, …), in the order of processes; a row is its process's `own_row`."""
    mesh = jax.sharding.get_mesh()
    # Every device of the mesh holds a row, since an array is sharded over devices and not over processes.
    rows = np.stack([own_row] * len(mesh.local_devices))
    spread = jax.make_array_from_process_local_data(NamedSharding(mesh, P(AXES)), rows)
    owner = jax.make_array_from_process_local_data(NamedSharding(mesh, P(AXES)), np.full(len(rows), jax.process_index(), np.int32))
    values, owners = (np.asarray(x) for x in _replicated(spread, owner))
    # The mesh need not list devices in the order of their processes.
    return values[np.argsort(owners, kind="stable")]


@jax.jit
def _replicated(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Return the arrays with every element on every device."""
    return tuple(jax.sharding.reshard(jnp.asarray(x), P()) for x in arrays)
