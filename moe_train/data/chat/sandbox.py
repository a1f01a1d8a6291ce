"""Chat templates, rendered as transformers renders them, in a process that has no more time and memory than is stated.

A template is a program that came with somebody's model. jinja2's sandbox keeps it away from files and code, but not from
an endless loop or from a string that fills the memory: so it runs in a child process, which the kernel ends when its
processor time is up, and which can neither write files nor grow. What depends on the day or on chance (`strftime_now`,
`random`, `lipsum`) is left out: a record's tokens must be the same tomorrow.

The child's program is `renderer`.
"""

from __future__ import annotations

import functools
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, cast

from moe_train.data.chat import renderer
from moe_train.data.chat.renderer import Limits

GENERATION = renderer.GENERATION
_BATCH = 1 << 20  # bytes of requests that cross at once

Prefix = tuple[int, bool]
"""How many messages, and whether the assistant comes next."""


class Request(NamedTuple):
    """Variables of a template, plain JSON values; prefixes: which prefixes of `messages` to render (empty: render once, with
    the variables as they are)."""

    variables: dict[str, Any]
    prefixes: Sequence[Prefix] = ()


def render(template: str, requests: Sequence[dict[str, Any]], limits: Limits = Limits()) -> list[str]:  # noqa: B008 (immutable)
    """The template's text for each set of variables, with the marks `GENERATION` in it.

    Raises ValueError (one line) for a template that cannot be read, fails, or takes more than `limits`.
    """
    found = [text for texts in render_prefixes(template, [Request(each) for each in requests], limits) for text in texts]
    for text in found:
        if isinstance(text, ValueError):
            raise text
    return cast(list[str], found)


def render_prefixes(
    template: str,
    requests: Sequence[Request],
    limits: Limits = Limits(),  # noqa: B008 (immutable)
) -> list[list[str | ValueError]]:
    """The texts of each request's prefixes, or (one line) why the template gives none.

    Many requests cross to the other process at once. Where they come to a limit together, they are rendered one by one, so
    that the limits are of one request; behind the third that comes to one they are given up, so that an endless loop is
    not waited for a thousand times. Raises ValueError for a template that cannot be read.
    """
    if len(template) > limits.template:
        raise ValueError(f"the chat template has {len(template):,} characters; {limits.template:,} are allowed")
    found: list[list[str | ValueError]] = []
    for batch in _batches(requests, limits):
        for each in _answers(template, batch, _child(limits)):
            if "unreadable" in each:
                raise ValueError(each["unreadable"])
            if "over" in each:
                found.append([ValueError(each["over"])])
            else:
                found.extend(map(_texts, each["texts"]))
    return [texts * max(1, len(r.prefixes)) if len(texts) == 1 else texts for texts, r in zip(found, requests, strict=True)]


def _answers(template: str, batch: list[bytes], child: _Child) -> list[dict[str, Any]]:
    """Each with the texts of some requests in order, or what is wrong with one."""
    found: list[dict[str, Any]] = []
    for _ in range(3):
        together = child.ask(template, batch)
        if "over" not in together or len(batch) == 1:
            return [*found, together]
        while batch:
            found.append(child.ask(template, [batch.pop(0)]))
            if "over" in found[-1]:
                break
        else:
            return found
    what = "not rendered: the chat template came to a limit of time or size for three records before it"
    return [*found, *[{"over": what}] * len(batch)]


def _batches(requests: Sequence[Request], limits: Limits) -> Iterator[list[bytes]]:
    """The requests as JSON, about `_BATCH` bytes at a time."""
    batch: list[bytes] = []
    room = _BATCH
    for request in requests:
        text = json.dumps(request)
        max_output = min(limits.output, max(1 << 20, 64 * len(text)))  # so that many records cannot fill the memory either
        batch.append(f"[{text}, {max_output}]".encode())
        room -= len(text)
        if room <= 0:
            yield batch
            batch, room = [], _BATCH
    if batch:
        yield batch


def _texts(answer: list[str | int | list[str]]) -> list[str | ValueError]:
    """A number stands for so many characters of the first text, a list for an error."""
    whole = answer[0]
    return [ValueError(*a) if isinstance(a, list) else a if isinstance(a, str) else cast(str, whole)[:a] for a in answer]


# --- the process -----------------------------------------------------------------------------------------------


@functools.lru_cache
def _child(limits: Limits) -> _Child:
    return _Child(limits)


class _Child:
    """The process that renders; started when it is needed first, and again after it had to be ended."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._lock = limits, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def ask(self, template: str, requests: list[bytes]) -> dict[str, Any]:
        """`texts` of every request, or `over` or `unreadable`: what is wrong with them, or with the template."""
        with self._lock:
            if self._connection is None:
                self._start()
            assert self._process is not None and self._connection is not None
            try:
                question = b'{"template": %b, "requests": [%b]}' % (json.dumps(template).encode(), b",".join(requests))
                self._connection.send_bytes(question)
                return json.loads(self._connection.recv_bytes())
            except (EOFError, ConnectionError):
                self._connection.close()
                self._connection = None
                code = self._process.wait()
            if code == -signal.SIGPROF:
                return {"over": f"the chat template takes longer than {self._limits.seconds} s for one record; is a loop endless?"}
            return {"over": f"the chat template broke the process that renders it (exit code {code})"}

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # -P: that file's folder is no place to import from. Its own session: an interrupt is ours to handle.
            command = [sys.executable, "-P", str(Path(renderer.__file__)), str(theirs.fileno()), *map(str, self._limits)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True, cwd="/"
            )
        self._connection = Connection(ours.detach())
