"""The jinja2 environment in which the child process renders chat templates. It imports nothing else from this package.

It is transformers' environment without what makes a text depend on chance, and with bounds on what one operation may write:
a template that prints the address of an object, or asks for a billion characters, is refused before it has any effect.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2.runtime import Context, Undefined

# Next to the marks of `renderings.PLAIN_TEXT_MARKS`; `renderings.marked_text` refuses texts that contain any of the four.
GENERATION = ("\ufdd2", "\ufdd3")
"""Unicode noncharacters that enclose what a template marks with {% generation %}."""
DATE = "moe_train_chat_date"
"""Name of the variable that holds the date of `strftime_now`, as YYYY-MM-DD."""
_UNDATED = "2026-01-01"  # the date of a template that sets none
_LARGEST = 1 << 20
"""Characters or items that one repetition or padding may write."""
_LARGEST_NUMBER = 1 << 16
"""Bits that a product or power may have."""
_WIDEST = 1000
"""Characters to which a number or text may be padded by a format."""
_CALL = 50
"""Iterations of a loop that a call counts as."""


class Refusal(jinja2.TemplateError):
    """An error raised by the template itself, with `raise_exception`, because it does not accept the conversation."""


class TooLarge(jinja2.TemplateError):
    """An operation of the template would write more than it may."""


class Endless(jinja2.TemplateError):
    """The template takes too many steps."""


class Unstable(jinja2.TemplateError):
    """The template would write a text that is another one in each process."""


class Generation(jinja2.ext.Extension):
    """The tag `{% generation %} … {% endgeneration %}`, with which transformers marks what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own spelling)

    def parse(self, parser: Any) -> Any:
        """Parse the tag to a call of `_mark` with the body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return GENERATION[0] + caller() + GENERATION[1]


class CodeGenerator(jinja2.compiler.CodeGenerator):
    """jinja2's compiler, with `~` joined by the environment."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Any) -> None:
        """Join the operands with `Environment.join`."""
        self.write("environment.join((")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write("))")


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment. `budget` is the number of iterations that are left to the record; the caller sets it for each record."""

    code_generator_class = CodeGenerator
    # jinja2 compiles only these operators to `call_binop`; `~` is no binary operator to it, hence `CodeGenerator`.
    intercepted_binops = frozenset(["*", "**", "%", "+", "-"])

    def __init__(self, largest_text: int) -> None:
        """Create the environment; no operation gives a text of more than `largest_text` characters."""
        # Not optimized: constant expressions would be computed, whatever their size, while the template is compiled.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, jinja2.ext.loopcontrols],
            optimized=False,
            finalize=_printable,
        )
        self.largest_text = largest_text
        self.budget = 0
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = _strftime_now
        # Both would give another text in each rendering.
        del self.filters["random"], self.globals["lipsum"]
        for name in _TEXT_FILTERS & self.filters.keys():
            self.filters[name] = _checked_filter(name, self.filters[name], largest_text)
        for name in _SIZES & self.filters.keys():
            self.filters[name] = _bounded_filter(self.filters[name])
        # Not for templates, but for the loops that `_parse` rewrites.
        self.filters["_counted"] = self._counted

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        """Parse a template, and have the items of each loop counted."""
        tree = super()._parse(source, name, filename)
        # A list, since the tree is edited during the iteration.
        for loop in list(tree.find_all(jinja2.nodes.For)):
            counted = jinja2.nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
            loop.iter = counted.set_environment(self)
        return tree

    def _counted(self, items: Any) -> Any:
        """Return the items of a loop, whose number is taken from the budget."""
        # A generator has to be consumed to count its items.
        if not hasattr(items, "__len__"):
            items = list(items)
        self._spend(len(items))
        return items

    def _spend(self, count: int) -> None:
        self.budget -= count
        if self.budget < 0:
            raise Endless("takes too many steps")

    def join(self, operands: Sequence[Any]) -> str:
        """Join the operands of `~`."""
        texts = [operand if operand.__class__ is str else str(_plain(operand)) for operand in operands]
        _check_size(sum(map(len, texts)), self.largest_text)
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a binary operation whose result is not too large."""
        if operator == "+":
            if isinstance(left, _SIZED) and isinstance(right, _SIZED) and len(left) + len(right) > self.largest_text:
                _check_size(len(left) + len(right), self.largest_text)
            return left + right
        if operator == "*":
            return _product(left, right)
        if operator == "**":
            # x ** n has about n times as many bits as x.
            if isinstance(left, int) and isinstance(right, int):
                _check_size(left.bit_length() * abs(right), _LARGEST_NUMBER)
            return left**right
        if operator == "%":
            if isinstance(left, str | bytes):
                # `%` formats text, with any value on its right; for numbers it is the remainder.
                _check_percent(left)
                _plain(right)
            return left % right
        result = left - right
        # Keys and items of a dict are views, whose difference is a set; the order of a set depends on the hash seed.
        if isinstance(result, set | frozenset):
            raise Unstable("it subtracts views of an object's keys, and the order of the result is random")
        return result

    # The underscores are jinja2's: a keyword argument of the template must not collide with a parameter of this method.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method whose result is not too large."""
        __self._spend(_CALL)
        # Bound methods such as `text.center` can write large texts, too, and bypass the filters.
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes):
            args = _checked_arguments(owner, __obj.__name__, args, __self.largest_text)
        elif isinstance(owner, int):
            _check_numbers([*args, *kwargs.values()])
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return a safe replacement of `str.format`, or None if `value` is another function."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = value.__self__

        def formatted(*args: Any, **kwargs: Any) -> str:
            _check_braces(text)
            _plain(args)
            _plain(kwargs)
            return wrapped(*args, **kwargs)

        return formatted


# --- what templates call ---------------------------------------------------------------------------------------


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Serialize to JSON as transformers does; jinja2's own filter escapes HTML."""
    _check_size(len(indent) if isinstance(indent, str) else indent or 0, _WIDEST)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: Any) -> None:
    """Implement `raise_exception`, with which templates reject a conversation."""
    raise Refusal(str(_plain(message)))


@jinja2.pass_context
def _strftime_now(context: Context, pattern: str) -> str:
    """Format the date that is set for the template, at midnight: the time of the day is another one in each rendering."""
    date = context.get(DATE) or _UNDATED
    _check_size(len(pattern), _WIDEST)
    return datetime.datetime.fromisoformat(date).strftime(pattern)


@jinja2.pass_context  # with the context jinja2 does not print constants while it compiles
def _printable(context: Context, value: Any) -> Any:
    """Return what `{{ value }}` prints."""
    return value if value.__class__ is str else _plain(value)


# --- texts that are the same in each process -------------------------------------------------------------------

_TEXT_FILTERS = frozenset(
    "capitalize center e escape filesizeformat forceescape format indent join lower pprint replace safe string striptags title "
    "trim truncate upper urlencode urlize wordcount wordwrap xmlattr".split()
)
"""Filters that convert their operand to text."""
_PLAIN = (str, int, float, bytes, type(None), range)
_CONTAINERS: tuple[type[Any], ...] = (list, tuple, dict, type({}.keys()), type({}.values()), type({}.items()))


def _plain(value: Any) -> Any:
    """Return the value if it is data, whose text is the same in each process. Raises Unstable otherwise."""
    if not _is_plain(value):
        raise Unstable(f"it prints an object of type {type(value).__name__}, whose text is no part of the record and changes")
    return value


def _is_plain(value: Any) -> bool:
    """Return whether a value and all that it contains are data."""
    if isinstance(value, _PLAIN):
        return True
    if isinstance(value, Undefined):
        return value._undefined_exception is jinja2.UndefinedError  # and no access that the sandbox denies
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    # Sets are missing from the containers on purpose: the order of their items is not fixed.
    return isinstance(value, _CONTAINERS) and all(map(_is_plain, list(value)))


def _checked_filter(name: str, function: Callable[..., Any], largest: int) -> Callable[..., Any]:
    """Return a filter that accepts only data, and writes no more than it may."""
    leading = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context comes before the operand

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        operands = list(args[leading:])
        if operands and name == "join":
            # The check would consume a generator, and leave nothing for the filter to join.
            operands[0] = list(operands[0])
        _plain(operands)
        _plain(kwargs)
        if operands:
            _check_filter(name, operands, kwargs, largest)
        return function(*args[:leading], *operands, **kwargs)

    return checked


def _bounded_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter whose numbers are not too large."""

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_numbers([*args[1:], *kwargs.values()])
        return function(*args, **kwargs)

    return bounded


# --- sizes -----------------------------------------------------------------------------------------------------

_SIZES = frozenset(["batch", "slice", "round"])
"""Filters whose numbers decide how large the result is."""
_SIZED = (str, bytes, list, tuple)
_PADDING = ("center", "ljust", "rjust", "zfill", "expandtabs")
_PERCENT = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|\d*)(?:\.(\*|\d*))?", re.DOTALL)


def _check_size(size: int, largest: int) -> None:
    """Raise TooLarge if a result would exceed the largest size allowed."""
    if size > largest:
        raise TooLarge(f"one of its operations asks for {size:,} characters, and at most {largest:,} are allowed")


def _check_numbers(values: Iterable[Any]) -> None:
    """Raise TooLarge if one of the values is a number beyond the largest padding."""
    for value in values:
        if isinstance(value, int):
            _check_size(abs(value), _LARGEST_NUMBER)


def _product(left: Any, right: Any) -> Any:
    """Multiply numbers, or repeat a text or list."""
    if isinstance(left, int) and isinstance(right, int):
        # A product has at most as many bits as both factors together.
        _check_size(left.bit_length() + right.bit_length(), _LARGEST_NUMBER)
    for repeated, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(repeated, _SIZED):
            _check_size(len(repeated) * times, _LARGEST)
    return left * right


def _check_percent(pattern: str | bytes) -> None:
    """Raise TooLarge if a pattern of `%` pads to a large width."""
    text = pattern if isinstance(pattern, str) else pattern.decode("latin-1")
    if "%" in text:
        for widths in _PERCENT.findall(text):
            for width in widths:
                # A width that is an argument could be any number.
                _check_size(_WIDEST + 1 if width == "*" else _number(width), _WIDEST)


def _check_braces(pattern: str) -> None:
    """Raise TooLarge if a pattern of `str.format` pads to a large width, or to one that is an argument."""
    for _, _, spec, _ in string.Formatter().parse(pattern):
        for width in re.findall(r"\d+", spec or ""):
            _check_size(_number(width), _WIDEST)
        if "{" in (spec or ""):
            raise TooLarge("it formats to a width that is an argument, and could be any number")


def _number(digits: str) -> int:
    """Return a width; one with many digits is only known to be large."""
    return int(digits or 0) if len(digits) < 10 else 10**10


def _check_filter(name: str, operands: list[Any], kwargs: dict[str, Any], largest: int) -> None:
    """Raise TooLarge if the result of a filter would be too large."""
    text = str(operands[0]) if operands[0].__class__ is not list else ""
    arguments = [*operands[1:], *kwargs.values()]
    match name:
        case "join":
            separator = max((len(str(argument)) for argument in arguments), default=0)
            sizes = [len(item) if isinstance(item, str) else len(str(item)) for item in operands[0]]
            _check_size(sum(sizes) + separator * len(sizes), largest)
        case "format":
            _check_percent(text)
        case "center":
            _check_numbers(arguments)
        case "indent" | "wordwrap":
            _check_numbers(arguments)
            width = max(map(_width, arguments), default=0)
            if width > _WIDEST:
                _check_size((text.count("\n") + 1) * width, _LARGEST)
        case "replace" if len(operands) > 2:
            _checked_arguments(text, "replace", tuple(operands[1:3]), largest)


def _width(argument: Any) -> int:
    """Return how many characters an argument of `indent` or `wordwrap` may add to a line: a text, or a number of spaces."""
    if isinstance(argument, str):
        return len(argument)
    return int(argument or 0)


def _checked_arguments(owner: Any, name: str, args: tuple[Any, ...], largest: int) -> tuple[Any, ...]:
    """Return the arguments of a method of a text. Raises TooLarge if its result would be too large."""
    if name in _PADDING:
        _check_numbers(args)
        if name == "expandtabs":
            tab = "\t" if isinstance(owner, str) else b"\t"
            _check_size(owner.count(tab) * (args[0] if args else 8), largest)
    elif name == "join" and args:
        # A generator could be consumed only once, so the list takes its place as the argument.
        items = list(args[0])
        _check_size(sum(map(len, items)) + len(owner) * len(items), largest)
        return (items, *args[1:])
    # Counting the occurrences takes time, so only if the result could be large at all.
    elif name == "replace" and len(args) > 1 and len(owner) * len(args[1]) > _LARGEST:
        _check_size(len(owner) + owner.count(args[0]) * len(args[1]), largest)
    elif name == "translate" and args and isinstance(args[0], dict):
        longest = max((len(value) for value in args[0].values() if isinstance(value, str)), default=1)
        _check_size(len(owner) * longest, largest)
    return args
