"""How far work has come: reported by what works, without knowing who listens. A command draws a bar, a program need not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Progress(NamedTuple):
    """How far one piece of work is."""

    what: str
    """What is being done; empty for the one thing that a command does."""
    done: int
    """0 as it begins."""
    total: int
    unit: str = ""
    """Of done and total: "bytes", "shards", …; empty where the numbers themselves tell people nothing."""
    detail: str = ""
    """Further figures, in words."""


Listener = Callable[[Progress], None]

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Pass to `listener` the progress of all work that begins inside the block, in this thread."""
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


def report(progress: Progress) -> None:
    """Say how far work of this thread is."""
    listener = _listener.get()
    if listener is not None:
        listener(progress)


def counted(what: str, total: int, unit: str = "") -> Callable[[int], None]:
    """Begin some work. The function returned is called, from any thread, with how much more of it is done."""
    listener, lock, done = _listener.get(), threading.Lock(), 0

    def add(more: int) -> None:
        nonlocal done
        with lock:
            done += more
            if listener is not None:
                listener(Progress(what, done, total, unit))

    add(0)
    return add
