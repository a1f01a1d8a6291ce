"""A template prints nothing that is another text in each process."""

from __future__ import annotations

import pytest

from moe_train.data.chat.sandbox import render
from moe_train.data.records.problem import Problem


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
