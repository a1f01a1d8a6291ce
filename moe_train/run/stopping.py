"""Stop or save before the end of a run: a signal to one process, on which all processes agree at the same step."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train.machine.interrupts import DroppedSignals
from moe_train.machine.mesh import AXES
from moe_train.machine.processes import UNFINISHED, announce_exit

EXIT_SECONDS = 4.0
"""Seconds that a start may take to end after a signal, before the process is ended where it is."""


OPENING = "opening the data"
"""What a run does first."""


class StopRequested(BaseException):
    """A signal before the first step. It is no `Exception`, so that nothing takes it for a damaged file."""


class StopRequest:
    """The signals that a run has received, and what the run does meanwhile."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Name of the first signal; None before one has arrived."""
        self.starting: str | None = OPENING
        """What the run does before its first step; None from the first step on."""
        self.ended = False

    def waits_for(self) -> str:
        """Return what the process is waiting for, in words."""
        if self.starting is None:
            return "the step or evaluation batch in progress, then for its checkpoint"
        return f"{self.starting}, for {EXIT_SECONDS:g} s at most; nothing is lost"


@contextlib.contextmanager
def signals(stop_request: StopRequest | None = None) -> Iterator[StopRequest]:
    """Catch SIGTERM and SIGINT while the block runs; the first one is answered at once with a line on stderr.

    Before the first step, a signal raises StopRequested in the main thread. If that is inside a long call of C code, such as a
    compilation, the process ends with exit code 75 after `EXIT_SECONDS`; nothing is lost then. Later, `reason` is set, and the
    caller stops after a step. A second signal has its usual effect.

    Args:
        stop_request: receives the signals; None for a new one.

    Handlers can only be installed in the main thread; in another thread nothing is caught.
    """
    stop_request = stop_request or StopRequest()
    stop_request.starting = OPENING
    stop_request.ended = False
    if threading.current_thread() is not threading.main_thread():
        yield stop_request
        return

    dropped = DroppedSignals()

    def record_signal(number: int, frame: FrameType | None) -> None:
        if stop_request.starting is not None and dropped.postpones(number, frame):
            return
        stop_request.reason = signal.Signals(number).name
        # Restored at once, so that a second signal acts as usual.
        signal.signal(number, previous_handlers[number])
        if stop_request.starting is not None:
            raise dropped.note(StopRequested(stop_request.reason), number)

    previous_handlers: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # Python's handlers wait until C code returns, but the number of the signal is written to this socket at once.
    receiver, sender = socket.socketpair()
    # `set_wakeup_fd` demands it, so that a handler can never block.
    sender.setblocking(False)
    previous_descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    answering = threading.Thread(target=_answer, args=(receiver, stop_request, frozenset(previous_handlers), dropped), daemon=True)
    answering.start()
    for number in previous_handlers:
        signal.signal(number, record_signal)
    try:
        with dropped.caught(record_signal):
            yield stop_request
    finally:
        stop_request.ended = True
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_descriptor)
        sender.close()  # ends the thread
        answering.join(EXIT_SECONDS + 1)
        receiver.close()


def _answer(receiver: socket.socket, stop_request: StopRequest, numbers: frozenset[int], dropped: DroppedSignals) -> None:
    """Say what the process waits for when a signal arrives, also while its main thread is in C code.

    A process that does not leave its start is ended.
    """
    while received := receiver.recv(1):
        if received[0] not in numbers:
            continue
        name = signal.Signals(received[0]).name
        # Past sys.stderr, whose lock the main thread may hold.
        os.write(2, f"moe-train: {name} received; waiting for {stop_request.waits_for()}\n".encode())
        until = time.monotonic() + EXIT_SECONDS
        while stop_request.starting is not None and not stop_request.ended:
            if time.monotonic() > until:
                os.write(2, f"moe-train: ended while {stop_request.starting}; start again to continue\n".encode())
                announce_exit(UNFINISHED)
                # sys.exit would only end this thread.
                os._exit(UNFINISHED)
            time.sleep(0.05)
            dropped.handle_again()
        return


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


class StopVotes:
    """Ask, again and again between two steps, whether any process was asked to stop. All processes must ask equally often."""

    def __init__(self, stop_request: StopRequest, mesh: Mesh) -> None:
        self._stop_request = stop_request
        self._mesh = mesh
        self._previous: jax.Array | None = None

    def __call__(self) -> bool:
        """Return what was voted at the previous call, so that no process waits for the device; one process answers at once."""
        is_asked = self._stop_request.reason is not None
        if jax.process_count() == 1:
            return is_asked
        answer = self._previous is not None and bool(jax.device_get(self._previous)[0])
        self._previous = vote((is_asked, False), self._mesh)
        return answer


@jax.jit
def _any(wishes: jax.Array) -> jax.Array:
    # One device that wishes it is enough.
    return jnp.max(wishes, axis=0)
