"""Let Ctrl-C and SIGTERM end a command within seconds, also while its main thread is inside a long call of C code."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_SECONDS = 4.0
"""Seconds that a command has to end after a signal, before its process is ended where it is."""


@contextlib.contextmanager
def ends_after_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGINT and SystemExit(143) for SIGTERM while the block runs, and end the process if that is late.

    Python raises them only when C code, such as a compilation, returns; after `EXIT_SECONDS` the process ends with exit code 130 or
    143. What the block writes must be complete or absent whenever that happens. Handlers can only be installed in the main thread;
    in another thread nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def raise_exit(number: int, _: FrameType | None) -> None:
        # A second signal ends the process at once.
        signal.signal(number, signal.SIG_DFL)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous_handlers = {number: signal.getsignal(number) for number in numbers}
    # The number of a signal is written to this socket at once, also while C code runs.
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    previous_descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    ended = threading.Event()
    watching = threading.Thread(target=_end_process, args=(receiver, frozenset(numbers), ended), daemon=True)
    watching.start()
    for number in numbers:
        signal.signal(number, raise_exit)
    try:
        yield
    finally:
        ended.set()
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_descriptor)
        sender.close()  # ends the thread
        watching.join(1)
        receiver.close()


def _end_process(receiver: socket.socket, numbers: frozenset[int], ended: threading.Event) -> None:
    """End the process some seconds after one of the signals, unless the block has ended."""
    while received := receiver.recv(1):
        if received[0] not in numbers:
            continue
        if not ended.wait(EXIT_SECONDS):
            # Past sys.stderr, whose lock the main thread may hold.
            name = signal.Signals(received[0]).name
            os.write(2, f"moe-train: ended by {name} within a call that cannot be interrupted\n".encode())
            # sys.exit would only end this thread.
            os._exit(128 + received[0])
        return
