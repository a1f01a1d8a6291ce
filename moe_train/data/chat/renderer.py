"""The program of the child process that renders chat templates for `sandbox`. It imports nothing else from this package."""

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

GENERATION = ("\ufdd2", "\ufdd3")
"""Unicode noncharacters that enclose what a template marks with {% generation %}."""


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


def _serve(connection: Connection, limits: Limits) -> None:
    """Answer requests until the other end of the connection is closed."""
    environment = _environment()

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

    Returns:
        `unreadable` if the template cannot be compiled, `over` if a limit is exceeded, otherwise `texts`: for each request its
        renderings, where a number stands for a prefix of the first one, and a list holds an error message.
    """
    import jinja2

    try:
        template = compiled(question["template"])
    except (jinja2.TemplateError, RecursionError, MemoryError) as error:
        return {"unreadable": f"the chat template cannot be read: {_line(error)}"}
    answers = []
    for (variables, prefixes), max_output in question["requests"]:
        texts: list[str | int | list[str]] = []
        characters_left = max_output
        for prefix in prefixes or [None]:
            try:
                text = _limited(template.generate(_prefix_variables(variables, prefix)), characters_left)
            except Exception as error:  # a template is a program and can raise anything
                if isinstance(error, MemoryError):
                    return {"over": f"the chat template takes more than {limits.memory >> 20} MiB of memory for one record"}
                texts.append([f"the chat template refuses the record: {_line(error)}"])
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


def _environment() -> Any:
    """Create the jinja2 environment that transformers uses, without what depends on the date or on chance."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """The tag `{% generation %} … {% endgeneration %}`, with which transformers marks what the assistant wrote."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own spelling)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return GENERATION[0] + caller() + GENERATION[1]

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        """Serialize to JSON as transformers does; jinja2's own filter escapes HTML."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    def refuse(message: str) -> None:
        """Implement `raise_exception`, with which templates reject a conversation."""
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
