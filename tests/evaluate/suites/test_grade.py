"""Graders, on answers as models write them."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train import config
from moe_train.evaluate.suites.grade import check_item, reads_control_tokens, text_grader
from moe_train.evaluate.suites.items import SuiteItem
from moe_train.evaluate.suites.not_graded import NotGraded
from moe_train.evaluate.suites.tool_calls import Call


def item(*answers: str, **more: Any) -> SuiteItem:
    return SuiteItem("1", "items.jsonl:1", [{"role": "user", "content": "?"}], [], answers, **more)


@pytest.mark.parametrize(
    ("grader", "expected", "answer", "score"),
    [
        (config.ExactGrader(name="exact"), ["blue"], " blue\n", 1),
        (config.ExactGrader(name="exact"), ["blue"], "Blue", 0),
        (config.ExactGrader(name="exact", ignore_case=True), ["STRASSE"], "straße", 1),
        (config.ExactGrader(name="exact"), ["grey", "blue"], "blue", 1),
        (config.ContainsGrader(name="contains"), ["blue"], "It is blue.", 1),
        (config.ContainsGrader(name="contains"), ["blue"], "It is red.", 0),
        (config.RegexGrader(name="regex", pattern=r"Answer: (\w+)"), ["b"], "Answer: a? No. Answer: b", 1),
        (config.RegexGrader(name="regex", pattern=r"Answer: (\w+)"), ["a"], "Answer: a? No. Answer: b", 0),
        (config.RegexGrader(name="regex", pattern=r"\d+"), ["42"], "7, or 42!", 1),
        (config.RegexGrader(name="regex", pattern=r"\d+"), ["42"], "none", 0),
        (config.RegexGrader(name="regex", pattern=r"a|(b)"), ["a"], "a", 0),
    ],
)
def test_scores(grader: config.Grader, expected: list[str], answer: str, score: float) -> None:
    graded = item(*expected)
    check_item(graded, grader)
    grade = text_grader(grader)
    assert grade is not None and grade(graded, answer) == score


SCHEMA = {"type": "object", "required": ["port"], "properties": {"port": {"type": "string"}}, "additionalProperties": False}


@pytest.mark.parametrize(
    ("answers", "text", "score"),
    [
        ((), '{"port": "Brest"}', 1),
        ((), '{"port": 3}', 0),
        ((), "Brest", 0),
        (('{"port": "Brest"}',), ' {"port":"Brest"} ', 1),
        (('{"port": "Brest"}',), '{"port": "Lorient"}', 0),
        (('{"port": "Brest"}',), '{"port": "Lorient", "port": "Brest"}', 0),
    ],
)
def test_json(answers: tuple[str, ...], text: str, score: float) -> None:
    grader = config.JsonSchemaGrader(name="json_schema")
    graded = item(*answers, schema=SCHEMA)
    check_item(graded, grader)
    grade = text_grader(grader)
    assert grade is not None and grade(graded, text) == score


@pytest.mark.parametrize(
    ("grader", "faulty", "message"),
    [
        (config.ExactGrader(name="exact"), item(), "has no answer, which the grader exact needs"),
        (config.ExactGrader(name="exact"), item("a", schema=SCHEMA), "schema has no effect with the grader exact"),
        (config.ChoiceGrader(name="choice"), item("a", choices=("a",)), "has 1 choices, and the grader choice needs 2"),
        (config.NumberGrader(name="number"), item("many"), "expected answer 'many' has no number"),
        (config.PerplexityGrader(name="perplexity"), item(), "has no answer, which the grader perplexity needs"),
        (config.ExactGrader(name="exact"), item("a")._replace(messages=[]), "a text without a question"),
        (config.ToolCallsGrader(name="tool_calls"), item(), "has no tool_calls"),
        (config.ToolCallsGrader(name="tool_calls"), item("no call"), "is not JSON"),
        (config.ExactGrader(name="exact"), item("a", tool_calls=()), "expected calls have no effect"),
        (config.JsonSchemaGrader(name="json_schema"), item("1"), "has no schema"),
        (config.JsonSchemaGrader(name="json_schema"), item(schema={"type": "objekt"}), "schema is no JSON schema"),
        (config.JsonSchemaGrader(name="json_schema"), item("x", schema={}), "expected answer is not JSON"),
    ],
)
def test_items_that_a_grader_cannot_use(grader: config.Grader, faulty: SuiteItem, message: str) -> None:
    with pytest.raises(ValueError, match=r"items.jsonl:1: ") as error:
        check_item(faulty, grader)
    assert message in str(error.value)


CALLS = (Call("port", {"name": "Brest", "depth": 12}), Call("tide", {}))


@pytest.mark.parametrize(
    ("answer", "any_order", "score"),
    [
        (
            '[TOOL_CALLS] [{"name": "port", "arguments": {"depth": 12.0, "name": "Brest"}}, {"name": "tide", "arguments": {}}]',
            False,
            1,
        ),
        (
            '<tool_call>{"name": "tide", "arguments": {}}</tool_call><tool_call>{"name": "port", "arguments": {}}</tool_call>',
            True,
            0,
        ),
        ('[TOOL_CALLS]tide[ARGS]{}[TOOL_CALLS]port[CALL_ID]x1[ARGS]{"name": "Brest", "depth": 12}', False, 0),
        ('[TOOL_CALLS]tide[ARGS]{}[TOOL_CALLS]port[CALL_ID]x1[ARGS]{"name": "Brest", "depth": 12}', True, 1),
        ("[TOOL_CALLS] I do not know", False, 0),
        ("It is 12 m deep.", False, 0),
    ],
)
def test_tool_calls(answer: str, any_order: bool, score: float) -> None:
    grader = config.ToolCallsGrader(name="tool_calls", any_order=any_order)
    grade = text_grader(grader)
    graded = item(tool_calls=CALLS)
    check_item(graded, grader)
    assert grade is not None and grade(graded, answer) == score
    assert reads_control_tokens(grader)


def test_calls_as_the_text_of_the_answer_and_no_calls() -> None:
    grade = text_grader(config.ToolCallsGrader(name="tool_calls"))
    assert grade is not None
    assert grade(item('[{"name": "tide", "arguments": {}}]'), '{"name": "tide", "arguments": {}}') == 1
    assert grade(item(tool_calls=()), "No call is needed.") == 1
    assert grade(item(tool_calls=()), '<tool_call>{"name": "tide", "arguments": {}}</tool_call>') == 0


def test_graders_without_a_text() -> None:
    assert text_grader(config.ChoiceGrader(name="choice")) is None
    assert text_grader(config.PerplexityGrader(name="perplexity")) is None
    with pytest.raises(ValueError, match="name its endpoint with --judge URL"):
        text_grader(config.JudgeGrader(name="judge", model="m"))


def test_a_schema_fetches_nothing_and_ends() -> None:
    grade = text_grader(config.JsonSchemaGrader(name="json_schema"))
    assert grade is not None
    inside = {"$ref": "#/$defs/count", "$defs": {"count": {"type": "integer"}}}
    assert grade(item(schema=inside), "3") == 1 and grade(item(schema=inside), '"3"') == 0
    for schema, reason in (
        ({"$ref": "http://127.0.0.1:9/schema.json"}, "refers to http://127.0.0.1:9/schema.json, which is not in it"),
        ({"$ref": "#"}, "refers to itself without end"),
    ):
        with pytest.raises(NotGraded, match=reason):
            grade(item(schema=schema), "3")
