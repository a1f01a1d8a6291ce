"""Render chat templates as transformers does, in a child process with limited time and memory.

A template is a program that came with somebody's model. jinja2's sandbox denies it files and code, but does not stop an endless
loop or a string that fills the memory. Therefore it runs in a child process that the kernel ends when its processor time is
used up, and that can neither write files nor grow beyond a limit. Nothing in it depends on the day or on chance, since a record
has to give the same tokens tomorrow.

The program of the child process is `renderer`, and what a template can do there is in `environment`.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, cast

from moe_train.data.chat import environment, renderer
from moe_train.data.chat.example import OTHER_TEMPLATE
from moe_train.data.chat.renderer import Limits
from moe_train.data.records.problem import Problem

GENERATION = environment.GENERATION
_BATCH = 1 << 20  # bytes of requests that are sent at once
_PACKAGE_ROOT = Path(__file__).parents[3]  # the folder that contains the package

Prefix = tuple[int, bool]
"""The number of messages, and whether the assistant's turn comes next (add_generation_prompt)."""


class Request(NamedTuple):
    """What to render for one record."""

    variables: dict[str, Any]
    """Variables of the template: plain JSON values."""
    prefixes: Sequence[Prefix] = ()
    """Prefixes of `messages` to render; if empty, render once with the variables as they are."""


def render(template: str, requests: Sequence[dict[str, Any]], limits: Limits = Limits()) -> list[str]:  # noqa: B008 (immutable)
    """Render the template for each set of variables; the texts contain the marks `GENERATION`.

    Raises:
        ValueError: In one line, if the template cannot be read, fails, or exceeds `limits`.
    """
    renderings: list[str] = []
    for texts in render_prefixes(template, [Request(variables) for variables in requests], limits):
        for text in texts:
            if isinstance(text, ValueError):
                raise text
            renderings.append(text)
    return renderings


def render_prefixes(
    template: str,
    requests: Sequence[Request],
    limits: Limits = Limits(),  # noqa: B008 (immutable)
) -> list[list[str | ValueError]]:
    """Render the prefixes of each request.

    Many requests are sent to the child process at once. If together they exceed a limit, they are rendered one by one, so that
    the limits apply to each request. After the third that exceeds one, the remaining ones are given up, so that an endless loop is
    not waited for a thousand times.

    Args:
        template: The template's text.
        requests: What to render.
        limits: The limits for each request.

    Returns:
        For each request, the text of each prefix, or a ValueError in one line that says why there is none.

    Raises:
        ValueError: If the template cannot be read.
    """
    if len(template) > limits.template:
        raise ValueError(f"the chat template has {len(template):,} characters; {limits.template:,} are allowed")
    renderings: list[list[str | ValueError]] = []
    for batch in _batches(requests, limits):
        for answer in _answers(template, batch, _child(limits)):
            if "unreadable" in answer:
                raise _fault(answer["unreadable"])
            if "over" in answer:
                renderings.append([_fault(answer["over"])])
            else:
                renderings.extend(map(_texts, answer["texts"]))
    # A request with a single answer has that answer for each of its prefixes.
    for i, (texts, request) in enumerate(zip(renderings, requests, strict=True)):
        if len(texts) == 1:
            renderings[i] = texts * max(1, len(request.prefixes))
    return renderings


def _answers(template: str, batch: list[bytes], child: _Child) -> list[dict[str, Any]]:
    """Return the child's answers: each has the texts of some requests in order, or the problem with one request."""
    answers: list[dict[str, Any]] = []
    # Each round tries all that is left at once, and after a limit one by one up to the record that exceeds it.
    for _ in range(3):
        answer = child.ask(template, batch)
        if "over" not in answer or len(batch) == 1:
            return [*answers, answer]
        while batch:
            answers.append(child.ask(template, [batch.pop(0)]))
            if "over" in answers[-1]:
                break
        else:
            return answers
    message = "not rendered: the chat template came to a limit of time or size for three records before it"
    return [*answers, *[{"over": message}] * len(batch)]


def _batches(requests: Sequence[Request], limits: Limits) -> Iterator[list[bytes]]:
    """Yield the requests as JSON, about `_BATCH` bytes at a time."""
    batch: list[bytes] = []
    bytes_left = _BATCH
    for request in requests:
        text = json.dumps(request)
        max_output = min(limits.output, max(1 << 20, 64 * len(text)))  # so that many records together cannot fill the memory
        batch.append(f"[{text}, {max_output}]".encode())
        bytes_left -= len(text)
        if bytes_left <= 0:
            yield batch
            batch = []
            bytes_left = _BATCH
    if batch:
        yield batch


def _fault(message: str, refused: bool = False) -> Problem:
    """Return the problem that a template fails, or that it rejects a record."""
    if refused:
        return Problem("refused", message, f"change or drop the record, or name another template {OTHER_TEMPLATE}")
    return Problem("template", message, f"correct the template, or name another {OTHER_TEMPLATE}")


def _texts(answer: list[str | int | list[Any]]) -> list[str | ValueError]:
    """Decode an answer: a number is the length of a prefix of the first text, a list holds the arguments of `_fault`."""
    first_text = answer[0]
    texts: list[str | ValueError] = []
    for entry in answer:
        if isinstance(entry, list):
            texts.append(_fault(*entry))
        elif isinstance(entry, str):
            texts.append(entry)
        else:
            texts.append(cast(str, first_text)[:entry])
    return texts


# --- the process -----------------------------------------------------------------------------------------------


@functools.lru_cache
def _child(limits: Limits) -> _Child:
    """Return the child process for these limits, which all callers share."""
    return _Child(limits)


class _Child:
    """The process that renders; it is started when first needed, and again after it had to be ended."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def ask(self, template: str, requests: list[bytes]) -> dict[str, Any]:
        """Send requests to the process.

        Returns:
            `texts` of every request; or `over` or `unreadable`, which say what is wrong with them or with the template.
        """
        with self._lock:
            if self._connection is None:
                self._start()
            assert self._process is not None and self._connection is not None
            try:
                question = b'{"template": %b, "requests": [%b]}' % (json.dumps(template).encode(), b",".join(requests))
                self._connection.send_bytes(question)
                # Not `recv`, which unpickles: a process that runs a stranger's template is not to be trusted.
                answer: dict[str, Any] = json.loads(self._connection.recv_bytes())
            except (EOFError, ConnectionError):
                answer = {}
            if answer and not answer.get("exhausted"):
                return answer
            # The process has ended, or holds on to the memory that it used up.
            self._connection.close()
            self._connection = None
            code = self._process.wait()
            if answer:
                return answer
            if code == -signal.SIGPROF:
                return {"over": f"the chat template takes longer than {self._limits.seconds} s for one record; is a loop endless?"}
            # By a fatal signal or a crash: a template that merely raises is answered.
            return {"over": f"the chat template broke the process that renders it (exit code {code})"}

    def _start(self) -> None:
        """Start the process, connected by a socket pair."""
        parent_end, child_end = socket.socketpair()
        with child_end:
            # -P keeps the current folder out of sys.path. In a session of its own, the child gets no Ctrl-C of this process.
            # The limits are passed in the order of the fields of `Limits`, which the program reads in that order.
            command = [sys.executable, "-P", "-m", renderer.__name__, str(child_end.fileno()), *map(str, self._limits)]
            search_path = [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[child_end.fileno()],
                start_new_session=True,
                cwd="/",
                # A fixed seed of hashes, so that no order of iteration differs between processes.
                env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, search_path))},
            )
        self._connection = Connection(parent_end.detach())
