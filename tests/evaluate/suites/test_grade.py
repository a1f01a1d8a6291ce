"""Graders, on answers as models write them."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train import config
from moe_train.evaluate.suites.grade import check_item, text_grader
from moe_train.evaluate.suites.items import SuiteItem


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
        (config.NumberGrader(name="number"), ["#### 1,234"], "So it costs $1234.00.", 1),
        (config.NumberGrader(name="number"), ["72"], "72 clips in April, 24 in May", 0),
        (config.NumberGrader(name="number", after="####"), ["x 1 #### 72"], "Thus #### 72 (of 100)", 0),
        (config.NumberGrader(name="number", after="####"), ["x 1 #### 72"], "12 + 60 #### 72\n", 1),
        (config.NumberGrader(name="number"), ["-3"], "The result is −3", 1),
        (config.NumberGrader(name="number"), [".5"], "0.50", 1),
        (config.NumberGrader(name="number"), ["1000000"], "1e6", 1),
        (config.NumberGrader(name="number"), ["3.14"], "3.141", 0),
        (config.NumberGrader(name="number", tolerance=0.01), ["3.14"], "3.141", 1),
        (config.NumberGrader(name="number"), ["3"], "three", 0),
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
        (config.JsonSchemaGrader(name="json_schema"), item("1"), "has no schema"),
        (config.JsonSchemaGrader(name="json_schema"), item(schema={"type": "objekt"}), "schema is no JSON schema"),
        (config.JsonSchemaGrader(name="json_schema"), item("x", schema={}), "expected answer is not JSON"),
    ],
)
def test_items_that_a_grader_cannot_use(grader: config.Grader, faulty: SuiteItem, message: str) -> None:
    with pytest.raises(ValueError, match=r"items.jsonl:1: ") as error:
        check_item(faulty, grader)
    assert message in str(error.value)
