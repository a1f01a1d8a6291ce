"""Graders of a suite: how an answer becomes a score from 0 to 1."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from moe_train.config.section import NonNegativeFloat, Positive, Section


def regular_expression(pattern: str) -> str:
    """Check that a text is a regular expression of Python's `re`."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error}); see Python's re") from error
    return pattern


class ExactGrader(Section):
    """1 if the answer, without white space at its ends, is one of the expected answers."""

    name: Literal["exact"]
    ignore_case: bool = False
    """Whether upper and lower case count as equal."""


class ContainsGrader(Section):
    """1 if the answer contains one of the expected answers."""

    name: Literal["contains"]
    ignore_case: bool = False
    """Whether upper and lower case count as equal."""


class RegexGrader(Section):
    """1 if what `pattern` finds last in the answer is one of the expected answers.

    An answer without a match scores 0.
    """

    name: Literal["regex"]
    pattern: Annotated[str, AfterValidator(regular_expression)]
    """Regular expression of Python's `re`; its first group, or the whole match, is compared."""


class NumberGrader(Section):
    """1 if the last number in the answer equals the last number in an expected answer, up to `tolerance` relative to the latter."""

    name: Literal["number"]
    tolerance: NonNegativeFloat = 0.0
    """Largest relative difference to the expected number."""
    after: str | None = None
    """Text that the number follows, such as the `####` of GSM8K, in the answer and in the expected answer; the last number of a
    text without it counts all the same. Null: the last number of the text.
    """
    latex: bool = False
    """Whether to compare as mathematics instead, with math-verify (extra `eval`), so that `\\frac{1}{2}`, `0.5` and `1/2` are
    equal; without the package the suite is refused.
    """

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.latex and self.tolerance:
            raise ValueError("tolerance has no effect with latex, which compares exactly; leave one of them out")
        return self


class WordErrorRateGrader(Section):
    """1 - the word error rate of the answer, but not less than 0: of a transcript, how many words differ from the expected one.

    The rate is the least number of words to substitute, delete or insert, divided by the number of expected words. Results also
    state that of all items together, `word_error_rate`.
    """

    name: Literal["word_error_rate"]
    ignore_case: bool = False
    """Whether upper and lower case count as equal."""
    ignore_punctuation: bool = False
    """Whether punctuation is left out of both texts."""


class JsonSchemaGrader(Section):
    """1 if the answer is JSON that is valid against the item's `schema`, and equals its expected answer if it has one."""

    name: Literal["json_schema"]


class ToolCallsGrader(Section):
    """1 if the answer makes the item's `tool_calls`: the same functions, with arguments that are equal as JSON values.

    Text beside the calls and ids of calls do not count. An item with `tool_calls: []` asks for an answer without calls.
    """

    name: Literal["tool_calls"]
    any_order: bool = False
    """Whether calls may come in another order than the item states."""


class ChoiceGrader(Section):
    """1 if the expected one of the item's `choices` is the likeliest continuation of the prompt."""

    name: Literal["choice"]
    compare: Literal["texts", "letters"] = "texts"
    """`texts` compares the choices themselves, `letters` the letters A, B, C, … which the prompt lists with `{choices}` in
    `prompt.template`, as MMLU does.
    """
    normalization: Literal["none", "characters"] = "none"
    """`none` compares log-probabilities of whole choices (`acc` of lm-evaluation-harness), `characters` divides each by the number
    of characters of its choice (`acc_norm`).
    """

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.compare == "letters" and self.normalization != "none":
            raise ValueError("normalization has no effect on letters, which all have one character; leave it out")
        return self


class PerplexityGrader(Section):
    """The geometric mean of the probabilities of the expected answer's tokens: 1 / perplexity, from 0 to 1.

    Nothing is generated. An item is a question with its answer, or a `text` alone.
    """

    name: Literal["perplexity"]


class FunctionGrader(Section):
    """The result of a Python function of your own: `function(item, answer)`, a number from 0 to 1 or a truth value.

    `item` is a dict with id, messages, tools, answers, choices, category and source. An item for which the function raises an
    exception, or returns anything else, counts as not graded.
    """

    name: Literal["function"]
    file: str
    """Python file, relative to the folder of the suite's file. It is imported, and so executed, only if it is also named on the
    command line (`--grader FILE`).
    """
    function: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = "grade"
    """Name of the function in the file."""


class JudgeGrader(Section):
    """The verdict of a model behind an OpenAI-compatible endpoint, which has to be named on the command line (`--judge URL`)."""

    name: Literal["judge"]
    model: str
    """Name of the model at the endpoint."""
    instructions: str = (
        "Judge an answer to a question. Reply with one word: correct or incorrect.\n\nQuestion: {question}\n\n"
        "Expected answer: {expected}\n\nGuidance: {guidance}\n\nAnswer to judge: {answer}"
    )
    """What the model is asked, in which `{question}`, `{answer}`, `{expected}` and `{guidance}` stand for the item's texts;
    `{expected}` and `{guidance}` are empty if the item has none.
    """
    verdicts: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=lambda: {"correct": 1.0, "incorrect": 0.0}, min_length=2
    )
    """{text: score}; the last of the texts that occurs in the reply as a word counts, and a reply without any leaves the item
    without a grade.
    """
    max_tokens: Positive = 256
    """Most tokens of a reply."""
    api_key_variable: str | None = None
    """Environment variable that holds the endpoint's key; null for none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "{answer}" not in self.instructions:
            raise ValueError("instructions have no {answer}, so the judge would not see what it judges; add it")
        folded = [verdict.casefold() for verdict in self.verdicts]
        if len(set(folded)) < len(folded):
            raise ValueError("two verdicts differ in upper and lower case alone, which a reply does not tell apart; rename one")
        return self


Grader = Annotated[
    ExactGrader
    | ContainsGrader
    | RegexGrader
    | NumberGrader
    | WordErrorRateGrader
    | JsonSchemaGrader
    | ToolCallsGrader
    | ChoiceGrader
    | PerplexityGrader
    | FunctionGrader
    | JudgeGrader,
    Field(discriminator="name"),
]
"""The tagged union of graders."""
