"""Progress reports: code that works reports how far it is, without knowing who listens.

A command listens and draws a bar; a program that uses the library need not listen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Progress(NamedTuple):
    """Progress of one piece of work."""

    what: str
    """What is being done; empty for the only task of a command."""
    done: int
    """Amount done; 0 at the beginning."""
    total: int
    unit: str = ""
    """Unit of done and total: "bytes", "shards", …; empty if the numbers themselves mean nothing to people."""
    detail: str = ""
    """Further figures, as text."""


Listener = Callable[[Progress], None]
"""Function that receives progress reports."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Pass the progress of all work that begins inside the block, in this thread, to `listener`."""
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


def report(progress: Progress) -> None:
    """Report the progress of work in this thread."""
    listener = _listener.get()
    if listener is not None:
        listener(progress)


def counted(what: str, total: int, unit: str = "") -> Callable[[int], None]:
    """Begin some work and return a function to report it with.

    The function is called, from any thread, with the amount done since its last call.

    Args:
        what: what is being done.
        total: total amount.
        unit: unit of the amounts.
    """
    # The listener is looked up now: threads that are started later do not see this thread's context variable.
    listener = _listener.get()
    lock = threading.Lock()
    done = 0

    def add(amount: int) -> None:
        nonlocal done
        with lock:
            done += amount
            if listener is not None:
                listener(Progress(what, done, total, unit))

    add(0)
    return add
