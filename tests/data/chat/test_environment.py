"""The environment of chat templates: large texts and random ones are refused at once, and the date is fixed."""

from __future__ import annotations

import time

import pytest

from moe_train.data.chat.sandbox import Limits, render
from moe_train.data.records.problem import Problem


@pytest.mark.parametrize(
    "expression",
    [
        "'x' * 10 ** 9",
        "10 ** 9 * 'x'",
        "[0] * 10 ** 9",
        "'x'.encode() * 10 ** 9",
        "'%1000000000d'|format(1)",
        "'%1000000000d' % 1",
        "'%.1000000000f' % 1",
        "'%*d' % (10 ** 9, 1)",
        "'%(a)1000000000d' % {'a': 1}",
        "'{:1000000000}'.format('x')",
        "'{:{}}'.format('x', 10 ** 9)",
        "'{a:>1000000000}'.format_map({'a': 'x'})",
        "'x'.center(10 ** 9)",
        "'x'|center(10 ** 9)",
        "'x'|center(width=10 ** 9)",
        "'x'.ljust(10 ** 9)",
        "'x'.rjust(10 ** 9)",
        "'1'.zfill(10 ** 9)",
        "'\\t'.expandtabs(10 ** 9)",
        "('x' * 10 ** 5).replace('x', 'y' * 10 ** 5)",
        "('x' * 10 ** 5)|replace('x', 'y' * 10 ** 5)",
        "('x' * 10 ** 5).join(range(10 ** 5)|map('string'))",
        "range(10 ** 5)|join('x' * 10 ** 5)",
        "('x' * 10 ** 5).translate({120: 'y' * 10 ** 5})",
        "('x\\n' * 10 ** 5)|indent(10 ** 5)",
        "('x\\n' * 10 ** 5)|indent('y' * 10 ** 5)",
        "'x'|tojson(indent=10 ** 9)",
        "messages|tojson(indent='y' * 10 ** 5)",
        "[1]|batch(10 ** 9, 'x')|list",
        "[1]|slice(10 ** 9)|list",
        "1|round(-10 ** 9)",
        "(1).to_bytes(10 ** 9, 'big')",
        "7 ** (7 ** (7 ** 7))",
        "2 ** (10 ** 9)",
        "range(10 ** 9)",
    ],
)
def test_a_billion_characters_are_refused_at_once(expression: str) -> None:
    begun = time.process_time()
    for template in (f"{{{{ {expression} }}}}", f"{{% set x = {expression} %}}", f"{{% if {expression} %}}{{% endif %}}"):
        with pytest.raises(Problem, match=r"asks for|Range too big|formats to a width") as caught:
            render(template, [{"messages": [1]}], Limits(memory=1 << 28))  # which would not hold the text
        assert "--chat-template" in caught.value.remedy and caught.value.rule == "template"
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(
    "growing", ["ns.x ~ ns.x", "ns.x + ns.x", "ns.x * 9", "ns.x.replace('a', 'aa')", "[ns.x, ns.x]|join", "'%s%s' % (ns.x, ns.x)"]
)
def test_a_text_does_not_grow_in_a_loop(growing: str) -> None:
    template = "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = " + growing + " %}{% endfor %}"
    with pytest.raises(Problem, match=r"asks for|memory"):
        render(template, [{}])


@pytest.mark.parametrize(
    "expression",
    [
        *("cycler", "self", "messages.append", "raise_exception", "namespace()", "joiner()", "cycler('a')", "'a'.upper", "caller"),
        *("[cycler]", "{'a': joiner()}", "messages|map('string')", "cycler ~ ''", "cycler|string", "[cycler]|join", "cycler|upper"),
        *(
            "'%s' % cycler",
            "'%s'|format(cycler)",
            "'{}'.format(cycler)",
            "'{a}'.format(a=[cycler])",
            "'{a}'.format_map({'a': self})",
        ),
        *("'%s' % [cycler('a')]", "(joiner(),)|string", "{'a': 1}.keys() - {'b': 1}.keys()", "dict", "messages|pprint ~ joiner()"),
        *("messages|batch(1)", "range", "cycler|e", "cycler|replace('a', 'b')", "cycler|tojson", "raise_exception(joiner())"),
    ],
)
def test_what_is_another_text_in_each_process_is_refused(expression: str) -> None:
    for template in (
        f"{{{{ {expression} }}}}",
        f"{{% set x %}}{{{{ {expression} }}}}{{% endset %}}",
        f"{{{{ '' ~ ({expression}) }}}}",
    ):
        if "caller" in expression:
            template = "{% macro m() %}" + template + "{% endmacro %}{% call m() %}{% endcall %}"
        with pytest.raises(Problem, match=r"prints an object|result is random|not JSON serializable|unsafe") as caught:
            render(template, [{"messages": [1]}])
        assert caught.value.rule == "template" and "0x" not in str(caught.value)


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
