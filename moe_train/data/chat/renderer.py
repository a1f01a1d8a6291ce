"""The program of the process that renders chat templates for `sandbox`; it imports nothing of ours.

An outline is a text with a placeholder for the content of each message. To make one, the template is rendered with stand-ins
for the contents. It may write, join and strip them, and ask whether one is empty (none is); any other use raises. So where
an outline can be made, the text is the same for all contents, apart from the contents in their places.
"""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

GENERATION = ("\ufdd2", "\ufdd3")
"""Unicode noncharacters around what a template marks with {% generation %}."""

PLACE = ("\ufdd4", "\ufdd5", "\ufdd6")
"""Around the number of the message whose content stands in a place of an outline: as it is, or (second) stripped."""


class Limits(NamedTuple):
    """What one record may cost: characters of the template and of all its texts, processor seconds, bytes of memory."""

    template: int = 1 << 18
    output: int = 1 << 26
    seconds: int = 10
    memory: int = 1 << 31


def _serve(connection: Connection, limits: Limits) -> None:
    """Answer until the other side is gone."""
    compiled = _Compiled()
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


def _answer(question: dict[str, Any], compiled: _Compiled, limits: Limits) -> dict[str, Any]:
    import jinja2

    try:
        whole = compiled.whole(question["template"])
    except (jinja2.TemplateError, RecursionError, MemoryError) as error:
        return {"unreadable": f"the chat template cannot be read: {_line(error)}"}
    answers = []
    for variables, prefixes, outline, room in question["requests"]:
        template = compiled.outline(question["template"]) if outline else whole
        if outline:
            variables["messages"] = [_left_open(i, message) for i, message in enumerate(variables["messages"])]
        texts: list[str | int | list[str]] = []
        left = room
        for prefix in prefixes or [None]:
            if prefix is not None:
                end, add_generation_prompt = prefix
                some = {"messages": variables["messages"][:end], "add_generation_prompt": add_generation_prompt}
            try:
                pieces = template.generate(variables if prefix is None else variables | some)
                text = _limited(map(_written, pieces) if outline else pieces, left)
            except (Exception, _Read) as error:  # a template is a program: it can fail in any way
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


# --- environments ----------------------------------------------------------------------------------------------


class _Compiled:
    """Templates compiled lately, whole and for outlines."""

    def __init__(self) -> None:
        self.whole = functools.lru_cache(maxsize=8)(_environment().from_string)
        self.outline = functools.lru_cache(maxsize=8)(_of_outlines(_environment()))


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


# --- outlines --------------------------------------------------------------------------------------------------


class _Read(BaseException):
    """A template has looked into a content, so that it has no outline. Not an Exception, which filters and tests may catch."""


def _read(*_: object) -> Any:
    raise _Read


class _Open:
    """A stand-in for a value that depends on contents: every use raises, but for those that the classes below define."""

    def __init_subclass__(cls) -> None:
        for name in (
            *("getattr", "hash", "bool", "str", "repr", "format", "len", "iter", "reversed", "contains", "getitem"),
            *("eq", "lt", "le", "gt", "ge", "int", "float", "index", "mul", "mod"),
        ):
            if vars(cls).get(f"__{name}__") is None:
                setattr(cls, f"__{name}__", _read)


class _Content(_Open):
    """Stands for a text with the contents of messages in it, none of them empty."""

    def __init__(self, written: str) -> None:
        self._written = written

    def __add__(self, other: object) -> _Content:
        return _Content(self._written + _text(other))

    def __radd__(self, other: object) -> _Content:
        return _Content(_text(other) + self._written)

    def __bool__(self) -> bool:
        return True if re.sub(f"{PLACE[1]}\\d+{PLACE[2]}", "", self._written) else _read()  # stripped, it may be empty

    def __eq__(self, other: object) -> bool:
        return not self if other == "" else _read() if isinstance(other, str | _Open) else False

    def strip(self) -> _Content:
        whole = re.fullmatch(f"{PLACE[0]}\\d+{PLACE[2]}", self._written)
        return _Content(PLACE[1] + self._written[1:]) if whole else _read()


class _Length(_Open):
    """Stands for the length of a text that is not empty."""

    def __bool__(self) -> bool:
        return True

    def __gt__(self, other: object) -> bool:
        return True if other == 0 else _read()

    def __eq__(self, other: object) -> bool:
        return False if other == 0 else _read()


def _written(value: Any) -> Any:
    return value._written if isinstance(value, _Content) else value


def _text(value: object) -> str:
    return text if isinstance(text := _written(value), str) else _read()


def _left_open(number: int, message: dict[str, Any]) -> dict[str, Any]:
    """The message with a stand-in for its content."""
    return message | {"content": _Content(f"{PLACE[0]}{number}{PLACE[2]}")} if message.get("content") else message


def _of_outlines(environment: Any) -> Callable[[str], Any]:
    """A function that compiles templates to be rendered with stand-ins, in an environment of its own."""
    import jinja2.nodes
    import jinja2.visitor

    # Statements whose text goes to the output or through `call`, and nowhere that would show what a stand-in is.
    known = ("Output", "For", "If", "Assign", "With", "ExprStmt", "Scope", "Macro", "CallBlock", "Break", "Continue")

    class Joined(jinja2.visitor.NodeTransformer):
        """`a ~ b` as `[a, b]|join`."""

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            return jinja2.nodes.Filter(jinja2.nodes.List(node.nodes), "join", [], [], None, None, lineno=node.lineno)

    def compiled(template: str) -> Any:
        tree = environment.parse(template)
        if any(type(node).__name__ not in known for node in tree.find_all(jinja2.nodes.Stmt)):
            return environment.from_string("{{ raise_exception('the template has parts that outlines have not') }}")
        return environment.from_string(Joined().visit(tree))

    def join(values: Iterable[Any], between: str = "", attribute: Any = None) -> Any:
        if attribute is not None:
            raise _Read
        parts = [part for value in values for part in (between, value if isinstance(value, _Content) else str(value))][1:]
        written = "".join(map(_text, parts))
        return _Content(written) if any(isinstance(part, _Content) for part in parts) else written

    def call(context: Any, function: Any, *positional: Any, **named: Any) -> Any:
        """A macro returns what it wrote as plain text: where that has contents in it, it has to be a stand-in again."""
        found = called(context, function, *positional, **named)
        return _Content(found) if isinstance(found, str) and PLACE[2] in found else found

    def getitem(value: Any, key: Any) -> Any:
        return _read() if isinstance(key, _Open) else gotten(value, key)

    def length(text: _Content) -> Any:
        return _Length() if text else 0

    called, gotten, filters, tests = environment.call, environment.getitem, environment.filters, environment.tests
    environment.call, environment.getitem = call, getitem
    environment.finalize = lambda value: _text(value) if isinstance(value, _Open) else value
    filters["join"] = join
    for name, mine in {"trim": _Content.strip, "string": lambda text: text, "length": length, "count": length}.items():
        filters[name] = _either(_Content, mine, filters[name])
    for name in ("string", "iterable", "sequence"):
        tests[name] = _either(_Content, lambda value: True, tests[name])
    for name in ("number", "integer"):
        tests[name] = _either(_Length, lambda value: True, tests[name])
    tests["sameas"] = lambda one, other: _read() if isinstance(one, _Open) else one is other
    return compiled


def _either(kind: type, mine: Callable[[Any], Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that is `mine` for values of `kind`, and `theirs` for all others."""

    def done(value: Any, *positional: Any, **named: Any) -> Any:
        if not isinstance(value, kind):
            return theirs(value, *positional, **named)
        return _read() if positional or named else mine(value)

    return done


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), Limits(*map(int, sys.argv[2:])))
    os._exit(0)
