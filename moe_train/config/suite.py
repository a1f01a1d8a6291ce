"""A suite: questions with known answers, how they are put to a model, and how its answers are graded. One YAML file holds one."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from moe_train.config.section import NonNegativeFloat, Positive, Section, Seed


def _regular_expression(pattern: str) -> str:
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
    pattern: Annotated[str, AfterValidator(_regular_expression)]
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


class JsonSchemaGrader(Section):
    """1 if the answer is JSON that is valid against the item's `schema`, and equals its expected answer if it has one."""

    name: Literal["json_schema"]


class ChoiceGrader(Section):
    """1 if the expected one of the item's `choices` is the likeliest continuation of the prompt."""

    name: Literal["choice"]
    normalization: Literal["none", "characters"] = "none"
    """`none` compares log-probabilities of whole choices (`acc` of lm-evaluation-harness), `characters` divides each by the number
    of characters of its choice (`acc_norm`).
    """


Grader = Annotated[
    ExactGrader | ContainsGrader | RegexGrader | NumberGrader | JsonSchemaGrader | ChoiceGrader, Field(discriminator="name")
]
"""The tagged union of graders."""


class FewShot(Section):
    """Solved examples that come before each question: the first `count` items of a file."""

    items: str
    """File of items, relative to the folder of the suite's file."""
    count: Positive
    """Number of items to take from the start of the file."""


class Prompt(Section):
    """How a question is put to the model: as a user's turn of a chat, or as text to continue."""

    chat: bool = True
    """Whether the question is a user's turn in the model's chat format, with the solved examples as earlier turns. Otherwise it is
    text to continue.
    """
    system: str | None = None
    """System turn before the question; null for none. For a chat only."""
    few_shot: FewShot | None = None
    """Solved examples that come before each question; null for none."""
    template: str = "Question: {question}\nAnswer: "
    """How a question is written as text to continue; `{question}` stands for it, and the answer follows."""
    separator: str = "\n\n"
    """Text that follows the answer of a solved example."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "{question}" not in self.template:
            raise ValueError(f"template {self.template!r} has no {{question}}, so every item would be the same; add it")
        if self.system is not None and not self.chat:
            raise ValueError("system is a turn of a chat, and chat is false; write it into the template, or set chat to true")
        return self


class AnswerGeneration(Section):
    """How answers are generated."""

    max_tokens: Positive = 256
    """Most tokens of an answer."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature; 0 always takes the most likely token."""
    seed: Seed = 0
    """Seed of sampling."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end an answer, in addition to the model's own end."""


class Suite(Section):
    """A suite of items.

    An item has a question (`question`, `prompt` or `messages`), the expected answer (`answer`, `expected_output`, or a list of
    equally good ones), and, depending on the grader, `choices` or `schema`. Further keys: `id`, `tools`, `category`, and
    `source`, which names what the item was made from, so that items of one source are not taken for independent ones.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the suite, in results and in `--require`."""
    items: str
    """File of records, relative to the folder of the suite's file."""
    limit: Positive | None = None
    """Number of items to take from the start; null for all."""
    prompt: Prompt = Prompt()
    """How a question is put to the model."""
    generation: AnswerGeneration = AnswerGeneration()
    """How answers are generated."""
    grader: Grader
    """How an answer is graded."""
    batch_size: Positive = 8
    """Number of items that are answered together; raise it on accelerators."""
