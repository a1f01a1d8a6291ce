"""Graders: functions that score an answer from 0 to 1.

jsonschema is imported where it is used: with all of its format checkers installed it takes a second of CPU time, and every run
of `train` imports this file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, assert_never

from moe_train import config
from moe_train.data.records.json_parser import parse_strictly
from moe_train.evaluate.suites import json_values
from moe_train.evaluate.suites.items import SuiteItem
from moe_train.evaluate.suites.judge import Endpoint, judge_grade
from moe_train.evaluate.suites.not_graded import NotGraded
from moe_train.evaluate.suites.numbers import check_number, number_grade
from moe_train.evaluate.suites.own_function import function_grade
from moe_train.evaluate.suites.tool_calls import Call, calls_of, find_calls, same_calls
from moe_train.evaluate.suites.word_errors import check_words, word_error_grade

Grade = Callable[[SuiteItem, str], float]
"""A function (item, answer of the model) -> score; it raises NotGraded if the answer cannot be graded."""


class GraderAccess(NamedTuple):
    """What a suite's grader may use beyond the answer."""

    suite: str = ""
    """Name of the suite, for messages."""
    folder: Path = Path()
    """Folder of the suite's file."""
    files: Sequence[Path] = ()
    """Python files that the user has named, and whose functions may be called."""
    judge: Endpoint | None = None
    """The endpoint that the user has named."""


def text_grader(grader: config.Grader, access: GraderAccess = GraderAccess()) -> Grade | None:  # noqa: B008 (immutable)
    """Return the function of a grader that reads the model's answer; None for one that compares likelihoods.

    Raises:
        FileNotFoundError, ValueError: The grader needs something that is missing or was not allowed.
    """
    match grader:
        case config.ExactGrader():
            return partial(_exact, ignore_case=grader.ignore_case)
        case config.ContainsGrader():
            return partial(_contains, ignore_case=grader.ignore_case)
        case config.RegexGrader():
            return partial(_regex, pattern=re.compile(grader.pattern))
        case config.NumberGrader():
            return number_grade(grader)
        case config.WordErrorRateGrader():
            return word_error_grade(grader)
        case config.JsonSchemaGrader():
            return _json
        case config.ToolCallsGrader():
            return partial(_tool_calls, any_order=grader.any_order)
        case config.FunctionGrader():
            return function_grade(grader, access.folder, access.files)
        case config.JudgeGrader():
            return judge_grade(grader, access.judge, access.suite)
        case config.ChoiceGrader() | config.PerplexityGrader():
            return None
        case _:
            assert_never(grader)


def reads_control_tokens(grader: config.Grader) -> bool:
    """Return whether a grader has to see control tokens by name, as calls begin with one."""
    return isinstance(grader, config.ToolCallsGrader)


def check_item(item: SuiteItem, grader: config.Grader) -> None:
    """Raise ValueError if an item lacks what its grader needs, or has what the grader does not read."""
    if item.schema is not None and not isinstance(grader, config.JsonSchemaGrader):
        raise ValueError(f"{item.location}: schema has no effect with the grader {grader.name}; remove it, or use json_schema")
    if item.tool_calls is not None and not isinstance(grader, config.ToolCallsGrader):
        raise ValueError(f"{item.location}: expected calls have no effect with the grader {grader.name}; use tool_calls")
    if not item.messages and not isinstance(grader, config.PerplexityGrader):
        raise ValueError(f"{item.location}: a text without a question is of use to the grader perplexity alone; write question")
    match grader:
        case config.JsonSchemaGrader():
            _check_schema(item)
        case config.ToolCallsGrader():
            try:
                _expected_calls(item)
            except ValueError as error:
                raise ValueError(f"{item.location}: {error}") from error
        case config.FunctionGrader() | config.JudgeGrader():
            pass  # both may judge an answer by the question alone
        case _ if not item.answers:
            raise ValueError(f"{item.location}: the item has no answer, which the grader {grader.name} needs; add answer")
    if isinstance(grader, config.ChoiceGrader) and len(item.choices) < 2:
        raise ValueError(f"{item.location}: the item has {len(item.choices)} choices, and the grader choice needs 2; add choices")
    if isinstance(grader, config.NumberGrader):
        check_number(item, grader)
    if isinstance(grader, config.WordErrorRateGrader):
        check_words(item, grader)


def _validator(schema: Mapping[str, Any]) -> Any:
    """Return the validator of a schema, which looks for references in the schema alone and not on the network."""
    import jsonschema
    import referencing

    return jsonschema.validators.validator_for(schema)(schema, registry=referencing.Registry())


def _check_schema(item: SuiteItem) -> None:
    import jsonschema

    if item.schema is None:
        raise ValueError(f"{item.location}: the item has no schema, which the grader json_schema needs; add it")
    try:
        jsonschema.validators.validator_for(item.schema).check_schema(item.schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"{item.location}: schema is no JSON schema ({error.message}); correct it") from error
    for answer in item.answers:
        try:
            parse_strictly(answer)
        except ValueError as error:
            raise ValueError(f"{item.location}: the expected answer is not JSON ({error}); write the JSON text") from error


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


def _json(item: SuiteItem, answer: str) -> float:
    import referencing.exceptions

    assert item.schema is not None  # `check_item` has made sure
    try:
        value = parse_strictly(answer)
    except ValueError:
        return 0.0
    try:
        is_valid = _validator(item.schema).is_valid(value)
    except referencing.exceptions.Unresolvable as error:
        raise NotGraded(
            f"the schema refers to {error.ref}, which is not in it; nothing is fetched, so write it into $defs"
        ) from error
    except RecursionError as error:
        raise NotGraded("the schema refers to itself without end; correct it") from error
    if not is_valid:
        return 0.0
    return float(not item.answers or any(json_values.equal(value, parse_strictly(expected)) for expected in item.answers))


def _expected_calls(item: SuiteItem) -> tuple[Call, ...]:
    """Return the calls that an item states as calls, or as the JSON text of its answer."""
    if item.tool_calls is not None:
        return item.tool_calls
    if len(item.answers) != 1:
        raise ValueError("the item has no tool_calls, which the grader tool_calls needs; add them ([] for an answer without calls)")
    return find_calls(item.answers[0]) or calls_of(item.answers[0])


def _tool_calls(item: SuiteItem, answer: str, any_order: bool) -> float:
    try:
        made = find_calls(answer)
    except ValueError:  # the model has written something that is no call
        return 0.0
    return float(same_calls(made, _expected_calls(item), any_order))
