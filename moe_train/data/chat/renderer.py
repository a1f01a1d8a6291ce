"""The program of the child process that renders chat templates for `sandbox`. Of this package it imports only `environment`."""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jinja2

from moe_train.data.chat.environment import Endless, Environment, Refusal


class Limits(NamedTuple):
    """The limits for rendering one record."""

    template: int = 1 << 18
    """Largest number of characters of the template."""
    output: int = 1 << 26
    """Largest number of characters of all renderings of the record."""
    seconds: int = 10
    """Processor time in seconds."""
    memory: int = 1 << 31
    """Address space in bytes."""
    steps: int = 5_000_000
    """Number of iterations of loops; a call counts as several."""


def _serve(connection: Connection, limits: Limits) -> None:
    """Answer requests until the other end of the connection is closed."""
    environment = Environment(limits.output)

    @functools.lru_cache(maxsize=8)
    def compiled(source: str) -> Any:
        template = environment.from_string(source)
        template.globals = dict(template.globals)  # each rendering copies the globals, and jinja2's ChainMap is slow to copy
        return template

    resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
    # Limits of 0 for files and core dumps keep the template from writing to disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            question = json.loads(connection.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, limits.seconds)  # the default action of SIGPROF ends the process
        answer = json.dumps(_answer(question, compiled, limits)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(answer)


def _answer(question: dict[str, Any], compiled: Callable[[str], Any], limits: Limits) -> dict[str, Any]:
    """Render all requests of a question.

    Args:
        question: The template and the requests.
        compiled: Compiles a template.
        limits: The limits for each request.

    Returns:
        `unreadable` if the template cannot be compiled, `over` if a limit is exceeded (`exhausted`: the memory is used up, and
        this process should be replaced), otherwise `texts`: for each request its
        renderings, where a number stands for a prefix of the first one, and a list holds an error message and whether the template
        rejects the record with it.
    """
    try:
        template = compiled(question["template"])
    except (jinja2.TemplateError, RecursionError, MemoryError) as error:
        return {"unreadable": f"the chat template cannot be read: {_line(error)}", "exhausted": isinstance(error, MemoryError)}
    answers = []
    for (variables, prefixes), max_output in question["requests"]:
        texts: list[str | int | list[Any]] = []
        characters_left = max_output
        # All prefixes of a record share one budget of steps, and below one of characters.
        template.environment.budget = limits.steps
        for prefix in prefixes or [None]:
            try:
                text = _limited(template.generate(_prefix_variables(variables, prefix)), characters_left)
            except Exception as error:  # a template is a program and can raise anything
                # A process that ran out of memory may fail at the next record, too, so `exhausted` has it replaced.
                if isinstance(error, MemoryError):
                    message = f"the chat template takes more than {limits.memory >> 20} MiB of memory for one record"
                    return {"over": message, "exhausted": True}
                if isinstance(error, Endless):
                    return {"over": f"the chat template takes more than {limits.steps:,} steps for one record; is a loop endless?"}
                refused = isinstance(error, Refusal)
                texts.append([f"the chat template {'refuses the record' if refused else 'fails'}: {_line(error)}", refused])
                continue
            if text is None:
                return {"over": f"the chat template writes more than {max_output:,} characters for one record"}
            # Most prefixes render to the beginning of the first text; then sending its length is enough.
            begins_first = texts and isinstance(texts[0], str) and texts[0].startswith(text)
            texts.append(len(text) if begins_first else text)
            characters_left -= 0 if begins_first else len(text)
        answers.append(texts)
    return {"texts": answers}


def _prefix_variables(variables: dict[str, Any], prefix: tuple[int, bool] | None) -> dict[str, Any]:
    """Return the variables for a prefix of the messages."""
    if prefix is None:
        return variables
    end, add_generation_prompt = prefix
    return variables | {"messages": variables["messages"][:end], "add_generation_prompt": add_generation_prompt}


def _limited(pieces: Iterable[str], limit: int) -> str | None:
    """Join the pieces; return None if they have more than `limit` characters."""
    joined = []
    for piece in pieces:
        limit -= len(piece)
        if limit < 0:
            return None
        joined.append(piece)
    return "".join(joined)


def _line(error: BaseException) -> str:
    """Format an error in one line of at most 500 characters."""
    return " ".join(str(error).split())[:500] or type(error).__name__


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), Limits(*map(int, sys.argv[2:])))
    os._exit(0)
