"""Graders: functions that score an answer from 0 to 1."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import assert_never

import jsonschema

from moe_train import config
from moe_train.evaluate.suites.items import SuiteItem

Grade = Callable[[SuiteItem, str], float]
"""A function (item, answer of the model) -> score."""
_NUMBER = re.compile(r"[-+−]?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|[-+−]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+−]?\.\d+")
"""A number with or without thousands separators; the minus sign may be Unicode's."""


def text_grader(grader: config.Grader) -> Grade | None:
    """Return the function of a grader that reads the model's answer; None for one that compares likelihoods."""
    match grader:
        case config.ExactGrader():
            return partial(_exact, ignore_case=grader.ignore_case)
        case config.ContainsGrader():
            return partial(_contains, ignore_case=grader.ignore_case)
        case config.RegexGrader():
            return partial(_regex, pattern=re.compile(grader.pattern))
        case config.NumberGrader():
            return partial(_number, grader=grader)
        case config.JsonSchemaGrader():
            return _json
        case config.ChoiceGrader():
            return None
        case _:
            assert_never(grader)


def check_item(item: SuiteItem, grader: config.Grader) -> None:
    """Raise ValueError if an item lacks what its grader needs."""
    if isinstance(grader, config.JsonSchemaGrader):
        if item.schema is None:
            raise ValueError(f"{item.location}: the item has no schema, which the grader json_schema needs; add it")
        try:
            jsonschema.validators.validator_for(item.schema).check_schema(item.schema)
        except jsonschema.SchemaError as error:
            raise ValueError(f"{item.location}: schema is no JSON schema ({error.message}); correct it") from error
        for answer in item.answers:
            try:
                json.loads(answer)
            except ValueError as error:
                raise ValueError(f"{item.location}: the expected answer is not JSON ({error}); write the JSON text") from error
        return
    if item.schema is not None:
        raise ValueError(f"{item.location}: schema has no effect with the grader {grader.name}; remove it, or use json_schema")
    if not item.answers:
        raise ValueError(f"{item.location}: the item has no answer, which the grader {grader.name} needs; add answer")
    if isinstance(grader, config.ChoiceGrader) and len(item.choices) < 2:
        raise ValueError(f"{item.location}: the item has {len(item.choices)} choices, and the grader choice needs 2; add choices")
    if isinstance(grader, config.NumberGrader):
        for answer in item.answers:
            if _last_number(answer, grader.after) is None:
                raise ValueError(f"{item.location}: the expected answer {answer[-40:]!r} has no number; use another grader")


def _exact(item: SuiteItem, answer: str, ignore_case: bool) -> float:
    return float(any(_folded(answer.strip(), ignore_case) == _folded(expected.strip(), ignore_case) for expected in item.answers))


def _contains(item: SuiteItem, answer: str, ignore_case: bool) -> float:
    return float(any(_folded(expected, ignore_case) in _folded(answer, ignore_case) for expected in item.answers))


def _folded(text: str, ignore_case: bool) -> str:
    return text.casefold() if ignore_case else text


def _regex(item: SuiteItem, answer: str, pattern: re.Pattern[str]) -> float:
    matches = list(pattern.finditer(answer))
    if not matches:
        return 0.0
    extracted = matches[-1][1 if pattern.groups else 0]
    # A group that took no part in the match is None.
    return float(extracted is not None and extracted.strip() in {expected.strip() for expected in item.answers})


def _number(item: SuiteItem, answer: str, grader: config.NumberGrader) -> float:
    value = _last_number(answer, grader.after)
    if value is None:
        return 0.0
    expected = [_last_number(text, grader.after) for text in item.answers]
    return float(any(number is not None and abs(value - number) <= grader.tolerance * abs(number) for number in expected))


def _last_number(text: str, after: str | None) -> float | None:
    """Return the last number of a text, or of what follows the last `after` in it; None if there is none."""
    if after is not None and after in text:
        text = text.rpartition(after)[2]
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None


def _json(item: SuiteItem, answer: str) -> float:
    assert item.schema is not None  # `check_item` has made sure
    try:
        value = json.loads(answer)
    except ValueError:
        return 0.0
    if not jsonschema.validators.validator_for(item.schema)(item.schema).is_valid(value):
        return 0.0
    return float(not item.answers or any(value == json.loads(expected) for expected in item.answers))
