"""A suite: questions with known answers, how they are put to a model, and how its answers are graded. One YAML file holds one."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from moe_train.config.graders import ChoiceGrader, Grader, PerplexityGrader, regular_expression
from moe_train.config.section import NonNegativeFloat, Positive, Section, Seed


class FewShot(Section):
    """Solved examples that come before each question: the first `count` items of `items`, a file or a pattern.

    per_category: the first `count` items that have the question's category, as MMLU has them, instead of the first of all.
    """

    items: str
    count: Positive
    per_category: bool = False


class Prompt(Section):
    """How a question is put to the model.

    chat: whether it is a user's turn in the model's chat format, with the solved examples as earlier turns and `system` before
    them. Otherwise it is text to continue: the solved examples and the question; the answer follows it, and `separator` follows an
    example's answer. template: how a question is written, in which {question}, {choices} (a line `A. …` for each choice) and
    {category} stand for the item's; null: the question alone in a chat, `Question: {question}\\nAnswer: ` in a text. preamble: text
    before the first question, in which {category} stands for the category of the question to answer.
    """

    chat: bool = True
    system: str | None = None
    few_shot: FewShot | None = None
    template: str | None = None
    preamble: str | None = None
    separator: str = "\n\n"

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
    """How answers are generated. `stop` lists texts that end an answer, in addition to the model's own end."""

    max_tokens: Positive = 256
    temperature: NonNegativeFloat = 0.0
    seed: Seed = 0
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()


class Columns(Section):
    """Names of the columns or keys that hold what an item has, where a file names them otherwise; null for the usual names.

    choices: one column that holds a list, or a column for each choice.
    """

    question: str | None = None
    answer: str | None = None
    choices: str | tuple[str, ...] | None = None
    category: str | None = None
    id: str | None = None


class Suite(Section):
    """A suite of items.

    items: a file of records or a pattern such as `mmlu/test/*.csv`, relative to the folder of the suite's file, or to that of
    `--suite-data`. An item has a question (`question`, `prompt` or `messages`), the expected answer (`answer`, `expected_output`,
    or a list of equally good ones), and, depending on the grader, `choices`, `schema`, `tool_calls` or `text`. Further keys: `id`,
    `tools`, `category`, `grading_guidance`, and `source`, which names what the item was made from, so that items of one source are
    not taken for independent ones. columns: other names for these keys. answers_are: how the answer of an item with choices names
    one of them; auto refuses an answer that could be the text of one and the letter or index of another. category_of_file: a
    regular expression whose first group, in the name of an item's file, is its category (an underscore counts as a space). limit:
    number of items to take from the start, of each category where they are named by `category_of_file`; null for all.
    batch_size: number of items that are answered together.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    items: str
    columns: Columns = Columns()
    answers_are: Literal["auto", "text", "letter", "index"] = "auto"
    category_of_file: Annotated[str, AfterValidator(regular_expression)] | None = None
    limit: Positive | None = None
    prompt: Prompt = Prompt()
    generation: AnswerGeneration = AnswerGeneration()
    grader: Grader
    batch_size: Positive = 8

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
