"""What a hostile chat template cannot do: see files or code, run for ever, fill the memory, write without end."""

from __future__ import annotations

import time

import pytest

from moe_train.data.chat.sandbox import Limits, Request, render, render_prefixes

LIMITS = Limits(template=10_000, output=1_000_000, seconds=1, memory=1 << 29)
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"

SLOW = "{% for i in range(99999) %}{% set x = ('ab' * 400000)|upper %}{% endfor %}"
HOARD = "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x, 'a' * 100000 ~ i] %}{% endfor %}"
DOUBLING = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (SLOW, "takes longer than 1 s for one record"),
        (ENDLESS, "takes more than 5,000,000 steps for one record"),
        (DOUBLING, "takes more than 5,000,000 steps"),
        (HOARD, "more than 512 MiB of memory|longer than 1 s"),
        ("{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}", "writes more than 1,000,000 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ " + "-" * 5_000 + "1 }}", "cannot be read: .*recursion"),
        ("x" * 10_001, "has 10,001 characters; 10,000 are allowed"),
        ("{% for", "cannot be read"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{{ namespace.__init__.__globals__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
        ("{{ [1, 2]|random }}", "No filter named 'random'"),
        ("{{ raise_exception('not\nthis') }}", "refuses the record: not this"),
    ],
)
def test_what_a_template_cannot_do(template: str, reason: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ValueError, match=reason) as caught:
        render(template, [{"messages": []}], LIMITS)
    assert time.monotonic() - begun < 60 and "\n" not in str(caught.value)
    assert render("{{ a }}", [{"a": 1}], LIMITS) == ["1"]  # the next record is rendered as if nothing had been


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (ENDLESS, "takes more than 5,000,000 steps for one record"),
        (SLOW, "takes longer than 1 s"),
        (HOARD, "for one record"),
        ("{{ 'a' * 10 ** 6 }}", "more"),
    ],
)
def test_the_limits_are_of_one_request(harm: str, reason: str) -> None:
    template = "{% if harm %}" + harm + "{% endif %}{{ 'b' * 600000 }}"
    found = render_prefixes(template, [Request({"harm": harm}) for harm in (False, True, False)], LIMITS)
    assert found[0] == found[2] == ["b" * 600_000] and reason in str(found[1][0]) and len(found[1]) == 1


def test_an_endless_loop_is_not_waited_for_a_thousand_times() -> None:
    begun = time.monotonic()
    template = "{% if harm %}" + ENDLESS + "{% endif %}b"
    found = render_prefixes(template, [Request({"harm": i != 1, "messages": []}, [(0, True)]) for i in range(50)], LIMITS)
    assert time.monotonic() - begun < 60 and len(found) == 50
    assert [str(text) for [text] in found].count("b") == 1 and found[1] == ["b"]
    assert [str(text).partition(" for ")[0] for [text] in found[:1] + found[2:5]] == [
        *["the chat template takes more than 5,000,000 steps"] * 3,
        "not rendered: the chat template came to a limit of time or size",
    ]


def test_a_small_record_becomes_no_large_text() -> None:
    [[refused]] = render_prefixes("{{ 'a' * 1000000 }}{{ 'a' * 1000000 }}", [Request({})])
    assert isinstance(refused, ValueError) and "writes more than 1,048,576 characters" in str(refused)
