"""The program that renders: transformers' filters and marks, and the prefixes of a conversation."""

from __future__ import annotations

import subprocess
import sys

from moe_train.data.chat import renderer
from moe_train.data.chat.sandbox import GENERATION, Request, render, render_prefixes


def test_what_is_rendered() -> None:
    template = "{{ a|tojson }} {% generation %}{{ b }}{% endgeneration %}"
    requests = [{"a": {"k": "<é>"}, "b": "🙂"}, {"a": None, "b": ""}]
    open_, close = GENERATION
    assert render(template, requests) == [f'{{"k": "<é>"}} {open_}🙂{close}', f"null {open_}{close}"]


def test_the_prefixes_of_a_conversation() -> None:
    template = (
        "{% for m in messages %}{{ m }}{% endfor %}{{ '?' if add_generation_prompt }}{{ messages[5] and raise_exception('six') }}"
    )
    request = Request({"messages": list("abcdef")}, [(3, False), (2, False), (2, True), (6, False)])
    three, two, asking, six = render_prefixes(template, [request])[0]
    assert (three, two, asking) == ("abc", "ab", "ab?") and str(six).startswith("the chat template refuses the record: six;")


def test_blocks_leave_no_space_and_loops_can_be_left() -> None:
    template = "{% for m in messages %}\n    {% if m == 'c' %}{% break %}{% endif %}\n    {{- m }}\n{% endfor %}"
    assert render(template, [{"messages": list("abcd")}]) == ["a\nb\n"]


def test_the_program_imports_only_the_environment() -> None:
    program = f"import sys, {renderer.__name__}; print(*(name for name in sys.modules if name.startswith('moe_train.')))"
    imported = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    chat = {f"moe_train.data.chat.{name}" for name in ("renderer", "environment", "template_bounds", "template_data")}
    assert set(imported) == {"moe_train.data", "moe_train.data.chat", *chat}
