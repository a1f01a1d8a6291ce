"""Stop or save before the end of a run: a signal to one process, on which all processes agree at the same step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train.machine.mesh import AXES


@contextlib.contextmanager
def signals() -> Iterator[SimpleNamespace]:
    """Catch SIGTERM and SIGINT while the block runs.

    Handlers can only be installed in the main thread; in another thread nothing is caught.

    Yields:
        A namespace whose `reason` is None, and the name of the first signal once it has arrived. A second signal has its usual
        effect.
    """
    stop_request = SimpleNamespace(reason=None)
    if threading.current_thread() is not threading.main_thread():
        yield stop_request
        return

    def record_signal(number: int, _: FrameType | None) -> None:
        stop_request.reason = signal.Signals(number).name
        # Restored at once, so that a second signal acts as usual.
        signal.signal(number, previous_handlers[number])

    previous_handlers: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in previous_handlers:
        signal.signal(number, record_signal)
    try:
        yield stop_request
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


class Votes(NamedTuple):
    """Whether any process wants to stop or to save, agreed on by all."""

    stop: bool = False
    save: bool = False

    def combined_with(self, other: Votes) -> Votes:
        """Combine two votes: stop or save if either asks for it."""
        return Votes(self.stop or other.stop, self.save or other.save)


def vote(wishes: tuple[bool, bool], mesh: Mesh) -> jax.Array:
    """Agree on what any process wishes.

    Args:
        wishes: (stop, save) of this process.
        mesh: the mesh of all processes.

    Returns:
        (2,) int32 on the device. All processes read the same value at the same step.
    """
    # One row per local device, so that the rows of all processes form one sharded array.
    local_wishes = np.tile(np.array(wishes, np.int32), (len(mesh.local_devices), 1))
    return _any(jax.make_array_from_process_local_data(NamedSharding(mesh, P(AXES)), local_wishes))


@jax.jit
def _any(wishes: jax.Array) -> jax.Array:
    return jnp.max(wishes, axis=0)
