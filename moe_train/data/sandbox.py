"""Chat templates, rendered as transformers renders them, in a process that has no more time and memory than is stated.

A template is a program that came with somebody's model. jinja2's sandbox keeps it away from files and code, but not from
an endless loop or from a string that fills the memory: so it runs in a child process, which the kernel ends when its
processor time is up, and which can neither write files nor grow. What depends on the day or on chance (`strftime_now`,
`random`, `lipsum`) is left out: a record's tokens must be the same tomorrow.

This file is both sides: `render` for the others, and the child's program, which imports nothing of ours.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, cast

GENERATION = ("\ufdd2", "\ufdd3")
"""Unicode noncharacters around what a template marks with {% generation %}."""

_BATCH = 1 << 20  # bytes of requests that cross at once


class Limits(NamedTuple):
    """What one record may cost: characters of the template and of all its texts, processor seconds, bytes of memory."""

    template: int = 1 << 18
    output: int = 1 << 26
    seconds: int = 10
    memory: int = 1 << 31


Prefix = tuple[int, bool]
"""How many messages, and whether the assistant comes next."""


class Request(NamedTuple):
    """Variables of a template, plain JSON values; prefixes: those of `messages` to render (none: all as it is)."""

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
    for variables, prefixes in requests:
        text = json.dumps(variables)
        allowed = min(limits.output, max(1 << 20, 64 * len(text)))  # so that many records cannot fill the memory either
        batch.append(f"[{text}, {json.dumps(prefixes)}, {allowed}]".encode())
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


# --- this side -------------------------------------------------------------------------------------------------


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
            # -P: this file's folder is no place to import from. Its own session: an interrupt is ours to handle.
            command = [sys.executable, "-P", str(Path(__file__)), str(theirs.fileno()), *map(str, self._limits)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True, cwd="/"
            )
        self._connection = Connection(ours.detach())


# --- the child's side ------------------------------------------------------------------------------------------


def _serve(connection: Connection, limits: Limits) -> None:
    """Answer until the other side is gone."""
    compiled = functools.lru_cache(maxsize=8)(functools.partial(_environment().from_string))
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            question = json.loads(connection.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, limits.seconds)  # SIGPROF, where nobody handles it, ends the process
        answer = json.dumps(_answer(question, compiled, limits)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(answer)


def _answer(question: dict[str, Any], compiled: Any, limits: Limits) -> dict[str, Any]:
    import jinja2

    try:
        template = compiled(question["template"])
    except (jinja2.TemplateError, RecursionError, MemoryError) as error:
        return {"unreadable": f"the chat template cannot be read: {_line(error)}"}
    answers = []
    for variables, prefixes, room in question["requests"]:
        texts: list[str | int | list[str]] = []
        left = room
        for prefix in prefixes or [None]:
            if prefix is not None:
                end, add_generation_prompt = prefix
                some = {"messages": variables["messages"][:end], "add_generation_prompt": add_generation_prompt}
            try:
                text = _limited(template.generate(variables if prefix is None else variables | some), left)
            except Exception as error:  # a template is a program: it can fail in any way
                if isinstance(error, MemoryError):
                    return {"over": f"the chat template takes more than {limits.memory >> 20} MiB of memory for one record"}
                texts.append([f"the chat template refuses the record: {_line(error)}"])
                continue
            if text is None:
                return {"over": f"the chat template writes more than {room:,} characters for one record"}
            begins = texts and isinstance(texts[0], str) and texts[0].startswith(text)
            texts.append(len(text) if begins else text)
            left -= 0 if begins else len(text)
        answers.append(texts)
    return {"texts": answers}


def _limited(pieces: Iterable[str], room: int) -> str | None:
    kept = []
    for piece in pieces:
        room -= len(piece)
        if room < 0:
            return None
        kept.append(piece)
    return "".join(kept)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _environment() -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %} … {% endgeneration %}`: transformers' mark of what the assistant wrote."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own spelling)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return GENERATION[0] + caller() + GENERATION[1]

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        """jinja2's own filter escapes HTML."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    del environment.filters["random"], environment.globals["lipsum"]
    return environment


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), Limits(*map(int, sys.argv[2:])))
    os._exit(0)
