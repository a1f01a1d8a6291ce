"""What makes a run stop or save before its end: a signal to one process, agreed on by all at one step."""

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
    """`reason` names the first SIGTERM or SIGINT; the second one has its usual effect. The handlers are the main thread's."""
    asked = SimpleNamespace(reason=None)
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, _: FrameType | None) -> None:
        asked.reason = signal.Signals(number).name
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Votes(NamedTuple):
    """What some process wants, agreed by all."""

    stop: bool = False
    save: bool = False

    def joined(self, other: Votes) -> Votes:
        return Votes(self.stop or other.stop, self.save or other.save)


def vote(wishes: tuple[bool, bool], mesh: Mesh) -> jax.Array:
    """(2,) int32 on the device: what any process wishes. All processes read the same, at the same step."""
    mine = np.tile(np.array(wishes, np.int32), (len(mesh.local_devices), 1))
    return _any(jax.make_array_from_process_local_data(NamedSharding(mesh, P(AXES)), mine))


@jax.jit
def _any(wishes: jax.Array) -> jax.Array:
    return jnp.max(wishes, axis=0)
