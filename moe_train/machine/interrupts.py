"""Let Ctrl-C and SIGTERM end a command within seconds, also while its main thread is inside a long call of C code."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_SECONDS = 4.0
"""Seconds that a command has to end after a signal, before its process is ended where it is."""

POLL_SECONDS = 0.05
"""Time between two looks of the watching thread."""

Handler = Callable[[int, FrameType | None], None]


class DroppedSignals:
    """Signals whose exception Python has dropped or would mistreat, to be handled again a moment later.

    An exception in a callback of the garbage collector, of which JAX has one, or in a `__del__` does not reach the code that runs:
    Python prints it and goes on. So it is for what a signal's handler raises there.
    """

    def __init__(self) -> None:
        self._raised: list[tuple[BaseException, int]] = []
        self._numbers: list[int] = []
        self._main_thread = threading.get_ident()  # only the main thread can install handlers

    def postpones(self, number: int, frame: FrameType | None) -> bool:
        """Return whether a handler must not raise now, since a C extension is starting; it is then called again later.

        Such a start ends with an ImportError, a crash or a module that is half there, where Python code that it runs raises.
        """
        while frame is not None:
            if frame.f_code.co_qualname.startswith("ExtensionFileLoader."):
                self._numbers.append(number)
                return True
            frame = frame.f_back
        return False

    def note(self, error: BaseException, number: int) -> BaseException:
        """Remember that a handler raises `error` for the signal `number`; returns `error`."""
        self._raised.append((error, number))
        return error

    @contextlib.contextmanager
    def caught(self, handler: Handler) -> Iterator[None]:
        """Collect the signals whose exception is dropped while the block runs, and install `handler` for them again.

        If the block fails after a handler has raised, what the handler raised comes out of it: C code that is interrupted, such as
        the start of a module that is imported, may end with an error of its own (`ImportError: initialization failed`).
        """
        previous_hook = sys.unraisablehook

        def collect(unraisable: sys.UnraisableHookArgs) -> None:
            numbers = [number for error, number in self._raised if error is unraisable.exc_value]
            if not numbers:
                previous_hook(unraisable)
                return
            signal.signal(numbers[0], handler)
            self._numbers.append(numbers[0])

        sys.unraisablehook = collect
        try:
            yield
        except Exception as error:
            if self._raised:
                raise self._raised[-1][0] from error
            raise
        finally:
            sys.unraisablehook = previous_hook

    def handle_again(self) -> None:
        """Have the main thread handle the collected signals; called by another thread, when the callback may be over."""
        numbers = self._numbers.copy()
        del self._numbers[: len(numbers)]
        for number in numbers:
            # Unlike `_thread.interrupt_main` it ends a call in which the main thread waits.
            signal.pthread_kill(self._main_thread, number)


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

    dropped = DroppedSignals()

    def raise_exit(number: int, frame: FrameType | None) -> None:
        if dropped.postpones(number, frame):
            return
        # A second signal ends the process at once.
        signal.signal(number, signal.SIG_DFL)
        raise dropped.note(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number), number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous_handlers = {number: signal.getsignal(number) for number in numbers}
    # The number of a signal is written to this socket at once, also while C code runs.
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    previous_descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    ended = threading.Event()
    watching = threading.Thread(target=_end_process, args=(receiver, frozenset(numbers), ended, dropped), daemon=True)
    watching.start()
    for number in numbers:
        signal.signal(number, raise_exit)
    try:
        with dropped.caught(raise_exit):
            yield
    finally:
        ended.set()
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_descriptor)
        sender.close()  # ends the thread
        watching.join(1)
        receiver.close()


def _end_process(receiver: socket.socket, numbers: frozenset[int], ended: threading.Event, dropped: DroppedSignals) -> None:
    """End the process some seconds after one of the signals, unless the block has ended."""
    while received := receiver.recv(1):
        if received[0] not in numbers:
            continue
        until = time.monotonic() + EXIT_SECONDS
        while not ended.wait(POLL_SECONDS):
            dropped.handle_again()
            if time.monotonic() > until:
                # Past sys.stderr, whose lock the main thread may hold.
                name = signal.Signals(received[0]).name
                os.write(2, f"moe-train: ended by {name} within a call that cannot be interrupted\n".encode())
                # sys.exit would only end this thread.
                os._exit(128 + received[0])
        return
