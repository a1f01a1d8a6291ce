"""The jinja2 environment in which the child process renders chat templates.

The child process imports this file, which imports only `template_bounds` and `template_data` from this package.

It is transformers' environment without what makes a text depend on chance, and with bounds on what one operation may write:
a template that prints the address of an object, or asks for a billion characters, is refused before it has any effect.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2.runtime import Context, LoopContext
from jinja2.utils import Namespace

from moe_train.data.chat.template_bounds import (
    SIZE_FILTERS,
    SIZED,
    WIDEST,
    check_braces,
    check_numbers,
    check_percent,
    check_size,
    checked_arguments,
    power,
    product,
)
from moe_train.data.chat.template_data import TEXT_FILTERS, Unstable, bounded_filter, checked_filter, plain_data

# Next to the marks of `renderings.PLAIN_TEXT_MARKS`; `renderings.marked_text` refuses texts that contain any of the four.
GENERATION = ("\ufdd2", "\ufdd3")
"""Unicode noncharacters that enclose what a template marks with {% generation %}."""
DATE = "moe_train_chat_date"
"""Name of the variable that holds the date of `strftime_now`, as YYYY-MM-DD."""
_UNDATED = "2026-01-01"  # the date of a template that sets none
_CALL = 50
"""Iterations of a loop that a call counts as."""
_DICT_NAMES = frozenset(dir(dict))
_DATA = frozenset([str, int, float, bool, type(None), list, dict])
"""Types of values that need no check by the sandbox, since they cannot be called."""


class Refusal(jinja2.TemplateError):
    """An error raised by the template itself, with `raise_exception`, because it does not accept the conversation."""


class Endless(jinja2.TemplateError):
    """The template takes too many steps."""


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
        for name in TEXT_FILTERS & self.filters.keys():
            self.filters[name] = checked_filter(name, self.filters[name], largest_text)
        for name in SIZE_FILTERS & self.filters.keys():
            self.filters[name] = bounded_filter(self.filters[name])
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
        texts = [operand if operand.__class__ is str else str(plain_data(operand)) for operand in operands]
        check_size(sum(map(len, texts)), self.largest_text)
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a binary operation whose result is not too large."""
        if operator == "+":
            if isinstance(left, SIZED) and isinstance(right, SIZED) and len(left) + len(right) > self.largest_text:
                check_size(len(left) + len(right), self.largest_text)
            return left + right
        if operator == "*":
            return product(left, right)
        if operator == "**":
            return power(left, right)
        if operator == "%":
            if isinstance(left, str | bytes):
                # `%` formats text, with any value on its right; for numbers it is the remainder.
                check_percent(left)
                plain_data(right)
            return left % right
        result = left - right
        # Keys and items of a dict are views, whose difference is a set; the order of a set depends on the hash seed.
        if isinstance(result, set | frozenset):
            raise Unstable("it subtracts views of an object's keys, and the order of the result is random")
        return result

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return an attribute or item as the sandbox does, without its checks where they cannot fail.

        Templates look up little else than fields of messages, of namespaces and of loops, and the checks take most of their time.
        """
        kind = type(obj)  # `obj.__class__` is a slow lookup for a namespace
        if kind is dict:
            # A name that every dict has, such as `items`, is a method, which the sandbox has to judge.
            if attribute in obj and attribute not in _DICT_NAMES:
                return obj[attribute]
        elif (kind is Namespace or kind is LoopContext) and not attribute.startswith("_"):
            value = getattr(obj, attribute, None)
            # None may stand for a missing name, which the sandbox makes undefined.
            if value is not None and value.__class__ in _DATA:
                return value
        return super().getattr(obj, attribute)

    # The underscores are jinja2's: a keyword argument of the template must not collide with a parameter of this method.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method whose result is not too large."""
        __self._spend(_CALL)
        # Bound methods such as `text.center` can write large texts, too, and bypass the filters.
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes):
            args = checked_arguments(owner, __obj.__name__, args, __self.largest_text)
        elif isinstance(owner, int):
            check_numbers([*args, *kwargs.values()])
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return a safe replacement of `str.format`, or None if `value` is another function."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = value.__self__

        def formatted(*args: Any, **kwargs: Any) -> str:
            check_braces(text)
            plain_data(args)
            plain_data(kwargs)
            return wrapped(*args, **kwargs)

        return formatted


# --- what templates call ---------------------------------------------------------------------------------------


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Serialize to JSON as transformers does; jinja2's own filter escapes HTML."""
    check_size(len(indent) if isinstance(indent, str) else indent or 0, WIDEST)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: Any) -> None:
    """Implement `raise_exception`, with which templates reject a conversation."""
    raise Refusal(str(plain_data(message)))


@jinja2.pass_context
def _strftime_now(context: Context, pattern: str) -> str:
    """Format the date that is set for the template, at midnight: the time of the day is another one in each rendering."""
    date = context.get(DATE) or _UNDATED
    check_size(len(pattern), WIDEST)
    return datetime.datetime.fromisoformat(date).strftime(pattern)


@jinja2.pass_context  # with the context jinja2 does not print constants while it compiles
def _printable(context: Context, value: Any) -> Any:
    """Return what `{{ value }}` prints."""
    return value if value.__class__ is str else plain_data(value)
