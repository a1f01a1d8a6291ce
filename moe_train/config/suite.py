"""A suite: questions with known answers, how they are put to a model, and how its answers are graded. One YAML file holds one."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from moe_train.config.graders import ChoiceGrader, Grader, PerplexityGrader, regular_expression
from moe_train.config.section import NonNegativeFloat, Positive, Section, Seed


class FewShot(Section):
    """Solved examples that come before each question."""

    items: str
    """File of items or a pattern, relative to the folder of the suite's file, or to that of `--suite-data`."""
    count: Positive
    """Number of items to take from the start."""
    per_category: bool = False
    """Whether to take the first `count` items that have the question's category, as in MMLU, instead of the first of all."""


class Prompt(Section):
    """How a question is put to the model: as a user's turn of a chat, or as text to continue."""

    chat: bool = True
    """Whether the question is a user's turn in the model's chat format, with the solved examples as earlier turns. Otherwise it is
    text to continue: the solved examples and the question, which the answer follows.
    """
    system: str | None = None
    """System turn before the solved examples; null for none. For a chat only."""
    few_shot: FewShot | None = None
    """Solved examples that come before each question; null for none."""
    template: str | None = None
    """How a question is written, in which `{question}`, `{choices}` (a line `A. …` for each choice) and `{category}` stand for the
    item's. Null: the question alone in a chat, `Question: {question}`, a new line and `Answer: ` in a text.
    """
    preamble: str | None = None
    """Text before the first question, in which `{category}` stands for the category of the question to answer; null for none."""
    separator: str = "\n\n"
    """Text that follows the answer of a solved example; not for a chat."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.template is not None and "{question}" not in self.template:
            raise ValueError(f"template {self.template!r} has no {{question}}, so every item would be the same; add it")
        if self.system is not None and not self.chat:
            raise ValueError("system is a turn of a chat, and chat is false; write it into preamble, or set chat to true")
        if self.chat and "separator" in self.model_fields_set:
            raise ValueError("separator has no effect in a chat, where examples are turns; leave it out, or set chat to false")
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


class Columns(Section):
    """Names of the columns or keys that hold what an item has, where a file names them otherwise; null for the usual names."""

    question: str | None = None
    """Column of the question; null for `question`, `prompt` or `messages`."""
    answer: str | None = None
    """Column of the expected answer; null for `answer` or `expected_output`."""
    choices: str | tuple[str, ...] | None = None
    """Column that holds a list of choices, or a column for each choice; null for `choices`."""
    category: str | None = None
    """Column of the category; null for `category`."""
    id: str | None = None
    """Column of the item's name; null for `id`."""


class Suite(Section):
    """A suite of items.

    An item has a question (`question`, `prompt` or `messages`), the expected answer (`answer`, `expected_output`, or a list of
    equally good ones), and, depending on the grader, `choices`, `schema`, `tool_calls` or `text`. Further keys: `id`, `tools`,
    `category`, `grading_guidance`, and `source`, which names what the item was made from, so that items of one source are not taken
    for independent ones.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the suite, in results and in `--require`."""
    items: str
    """File of items or a pattern such as `mmlu/test/*.csv`, relative to the folder of the suite's file, or to that of
    `--suite-data`.
    """
    columns: Columns = Columns()
    """Names of columns that are not the usual ones."""
    answers_are: Literal["auto", "text", "letter", "index"] = "auto"
    """How the answer of an item with choices names one of them; `auto` refuses an answer that could be the text of one and the
    letter or index of another.
    """
    category_of_file: Annotated[str, AfterValidator(regular_expression)] | None = None
    """Regular expression whose first group, in the name of an item's file, is its category (an underscore counts as a space); null
    for the categories that items state.
    """
    limit: Positive | None = None
    """Number of items to take from the start, of each category where `category_of_file` names them; null for all."""
    prompt: Prompt = Prompt()
    """How a question is put to the model."""
    generation: AnswerGeneration = AnswerGeneration()
    """How answers are generated."""
    grader: Grader
    """How an answer is graded."""
    batch_size: Positive = 8
    """Number of items that are answered together; raise it on accelerators."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.grader, ChoiceGrader | PerplexityGrader) and "generation" in self.model_fields_set:
            raise ValueError(f"generation has no effect with the grader {self.grader.name}, which generates nothing; leave it out")
        lists_choices = self.prompt.template is not None and "{choices}" in self.prompt.template
        if isinstance(self.grader, ChoiceGrader) and self.grader.compare == "letters" and not lists_choices:
            raise ValueError("letters mean nothing if the prompt does not list the choices; write {choices} into prompt.template")
        if self.category_of_file is not None and self.columns.category is not None:
            raise ValueError("category_of_file and columns.category both name the category; keep one of them")
        return self
