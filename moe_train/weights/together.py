"""What the processes that hold one model between them agree upon, over the mesh in force; alone, one agrees with itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train.mesh import AXES

_ROOM = 4096


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def all_agree(well: bool) -> bool:
    """Whether it went well in every process; none goes on before all have answered."""
    return well if jax.process_count() == 1 else bool(_over_processes(np.array([well], np.int32)).min())


def from_first(text: str) -> str:
    """The text that process 0 has."""
    if jax.process_count() == 1:
        return text
    encoded = np.zeros(_ROOM, np.int32)
    if is_first():
        own = np.frombuffer(text.encode(), np.uint8)
        encoded[: len(own)] = own
    (first, *_) = _over_processes(encoded)
    return bytes(first[: np.flatnonzero(first)[-1] + 1].astype(np.uint8)).decode()


def _over_processes(mine: np.ndarray) -> np.ndarray:
    """(devices, …): every device's row is its process's `mine`, in the order of processes."""
    mesh = jax.sharding.get_mesh()
    rows = np.tile(mine, (len(mesh.local_devices), 1))
    spread = jax.make_array_from_process_local_data(NamedSharding(mesh, P(AXES)), rows)
    owner = jax.make_array_from_process_local_data(NamedSharding(mesh, P(AXES)), np.full(len(rows), jax.process_index(), np.int32))
    found, owners = (np.asarray(x) for x in _whole(spread, owner))
    return found[np.argsort(owners, kind="stable")]


@jax.jit
def _whole(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jax.sharding.reshard(jnp.asarray(x), P()) for x in arrays)
