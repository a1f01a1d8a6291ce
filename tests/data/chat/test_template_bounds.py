"""Operations of a template that ask for a billion characters are refused at once."""

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
