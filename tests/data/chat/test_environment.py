"""The environment of chat templates: what templates do, the fixed date, and the lookup of attributes."""

from __future__ import annotations

import jinja2
import jinja2.sandbox
import pytest
from jinja2.runtime import LoopContext
from jinja2.utils import Namespace

from moe_train.data.chat.environment import Environment
from moe_train.data.chat.sandbox import render


def test_what_templates_do_is_not_refused() -> None:
    template = (
        "{% macro m(n) %}{{ n * '-' }}{% endmacro %}{% set ns = namespace(n=0, seen=[]) %}{% for k, v in a|items %}"
        "{% set ns.n = ns.n + 1 %}{% set ns.seen = ns.seen + [k] %}{{ loop.index ~ k ~ v }}{% endfor %}{{ m(3) }}"
        "{{ ns.seen|join(', ') }}{{ '%02d %s' % (7, 'b') }}{{ '%5.1f'|format(2) }}{{ '{:>4}'.format(ns.n) }}{{ a.keys()|list }}"
        "{{ 'x'|center(5) }}{{ a|tojson(indent=2)|length }}{{ dict(b=2) }}{{ range(3)|map('string')|join }}{{ none_such }}"
        "{{ None }}{{ ['b', 'a']|sort }}{{ 'a: {0}, {b}'.format(1, b=2) }}"
        "{{ 3 ** 2 }}{{ 'ab'[::-1] }}{{ 'a,b'.split(',') }}{{ 5 - 2 }}"
    )
    expected = "1k1---k07 b  2.0   1['k']  x  12{'b': 2}012None['a', 'b']a: 1, 29ba['a', 'b']3"
    assert render(template, [{"a": {"k": 1}}]) == [expected]


def test_the_date_is_that_of_the_template() -> None:
    template = "{{ strftime_now('%d %B %Y %H:%M') }}"
    dated = (
        "{% set moe_train_chat_date = '2024-02-29' %}{% macro m() %}" + template + "{% endmacro %}{% if 1 %}{{ m() }}{% endif %}"
    )
    assert render(dated, [{}]) == ["29 February 2024 00:00"]
    assert render(template, [{}]) == render(template, [{}])


NAMES = "role content items format first last nextitem calls none _role __class__ absent upper".split()


@pytest.mark.parametrize("kind", ["dict", "namespace", "loop", "text", "undefined", "list", "macro"])
def test_attributes_are_those_of_the_sandbox(kind: str) -> None:
    environment = Environment(1 << 20)
    fields = {"role": "user", "content": ["a"], "items": 3, "none": None, "_role": 1, "format": "{}".format, "calls": len}
    loop = LoopContext([1, 2], environment.undefined)
    next(loop)
    objects = {
        "dict": fields,
        "namespace": Namespace(fields),
        "loop": loop,
        "text": "a {}",
        "undefined": environment.undefined(name="x"),
        "list": [1],
        "macro": environment.from_string("{% macro m() %}{% endmacro %}").module.m,
    }
    for name in NAMES:
        looked_up = []
        for lookup in (Environment.getattr, jinja2.sandbox.SandboxedEnvironment.getattr):
            try:
                value = lookup(environment, objects[kind], name)
            except jinja2.TemplateError as error:
                value = repr(error)
            if isinstance(value, jinja2.Undefined):
                value = (value._undefined_exception, value._undefined_message)
            looked_up.append(value.__qualname__ if callable(value) else value)
        assert looked_up[0] == looked_up[1], name
