"""How far long work has come, told to whoever listens: a command draws a bar, a program need not listen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, int, int], None]
"""Takes what is being done, how much of it is done (0 as it begins), and how much there is in all, in any unit."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """`listener` hears of all work that begins in the block, in this thread."""
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


def counted(what: str, total: int) -> Callable[[int], None]:
    """Begin some work; the function returned is called, from any thread, with how much more of it is done."""
    listener, lock, done = _listener.get(), threading.Lock(), 0

    def add(more: int) -> None:
        nonlocal done
        with lock:
            done += more
            if listener is not None:
                listener(what, done, total)

    add(0)
    return add
