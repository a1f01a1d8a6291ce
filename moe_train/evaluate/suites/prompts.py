"""The tokens of an item's prompt: a turn of a chat, or text to continue, after the solved examples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from moe_train import config
from moe_train.data.chat.conversation_to_tokens import rendered_prompt
from moe_train.data.chat.example import RenderedPrompt
from moe_train.data.records.normal_form import Message, joined_texts
from moe_train.data.records.problem import located
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.evaluate.suites.items import SuiteItem
from moe_train.evaluate.suites.likelihood import Continuation

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""The names of choices in a prompt that lists them."""
_DEFAULT_TEXT = "Question: {question}\nAnswer: "


class Prompter(NamedTuple):
    """How the questions of a suite become tokens."""

    prompt: config.Prompt
    """The suite's section."""
    examples: Sequence[SuiteItem]
    """The solved examples, each with an answer."""
    tokenizer: Tokenizer
    """The model's tokenizer."""
    template: str | None
    """The text of the chat template; None for a tokenizer that has its own format, or without chat."""
    letters: bool = False
    """Whether solved examples are answered with the letter of their choice."""

    def rendered(self, item: SuiteItem) -> RenderedPrompt:
        """Return the prompt up to where the answer begins, with its pictures or sound.

        Raises:
            ValueError: The item cannot be written in this form; the message names its file and line.
        """
        if self.prompt.chat:
            messages = [*self._system(item), *self._turns(item)]
            return located(item.location, rendered_prompt, messages, self.template, self.tokenizer, item.tools)
        return RenderedPrompt(self._encoded(self._text(item)))

    def tokens(self, item: SuiteItem) -> list[int]:
        """Return the tokens up to where the answer begins, of an item without pictures and sound; otherwise like `rendered`."""
        rendered = self.rendered(item)
        if rendered.media:
            raise ValueError(
                f"{item.location}: the item has pictures or sound, which this grader shows to no model; remove the item"
            )
        return rendered.tokens

    def question(self, item: SuiteItem) -> list[Message]:
        """Return the messages of an item alone, with the suite's system turn, but without solved examples and preamble.

        So a record for training can hold it. In a suite of texts it is the question as it stands in the item.
        """
        if not self.prompt.chat:
            return list(item.messages)
        return [*self._system(item), *self._question_turns(item)]

    def continuation(self, item: SuiteItem, answer: str) -> Continuation:
        """Return the tokens of a prompt and of an answer that follows it.

        A text and its continuation are tokenized together, since a token may join a word with the space before it: the white space
        that ends the prompt is counted to the continuation (as lm-evaluation-harness counts it). A text without a question follows
        the token that begins a document; without such a token, its own first token is given.

        Raises:
            ValueError: As for `tokens`; also if the answer has no tokens of its own.
        """
        if not item.messages:
            if self.prompt.few_shot or self.prompt.preamble or self.prompt.system:
                raise ValueError(
                    f"{item.location}: nothing comes before a text without a question; leave few_shot, preamble and system out"
                )
            tokens = self.tokenizer.encode(answer)
            if self.tokenizer.bos_id is not None:
                tokens = [self.tokenizer.bos_id, *tokens]
            return self._checked(item, answer, tokens[:1], tokens[1:])
        if self.prompt.chat:
            return self._checked(item, answer, self.tokens(item), self.tokenizer.encode(answer))
        context = self._text(item)
        tokens = self._encoded(context + answer)
        # Of a prompt that is nothing but white space, with a tokenizer that begins no document, the first token is all.
        prompt = self._encoded(context.rstrip()) or tokens[:1]
        return self._checked(item, answer, prompt, tokens[len(prompt) :])

    def _checked(self, item: SuiteItem, answer: str, prompt: list[int], text: list[int]) -> Continuation:
        if not text:
            raise ValueError(f"{item.location}: the answer {answer!r:.60} has no tokens; write what the model is to say")
        return Continuation(prompt, text)

    def _examples(self, item: SuiteItem) -> list[SuiteItem]:
        """Return the solved examples for an item. Raises ValueError if its category has too few."""
        few_shot = self.prompt.few_shot
        if few_shot is None or not few_shot.per_category:
            return list(self.examples)
        examples = [example for example in self.examples if example.category == item.category][: few_shot.count]
        if len(examples) < few_shot.count:
            raise ValueError(
                f"{item.location}: few_shot.count is {few_shot.count}, but {few_shot.items} has {len(examples)} items of the "
                f"category {item.category}; add examples, or set per_category to false"
            )
        return examples

    def _solution(self, example: SuiteItem) -> str:
        """Return the answer of a solved example."""
        if self.letters:
            return LETTERS[example.choices.index(example.answers[0])]
        return example.answers[0]

    def _text(self, item: SuiteItem) -> str:
        """Return the text of preamble, solved examples and question."""
        text = self._preamble(item)
        for example in self._examples(item):
            text += f"{self._written(example, _DEFAULT_TEXT)}{self._solution(example)}{self.prompt.separator}"
        return text + self._written(item, _DEFAULT_TEXT)

    def _preamble(self, item: SuiteItem) -> str:
        return (self.prompt.preamble or "").replace("{category}", item.category or "")

    def _encoded(self, text: str) -> list[int]:
        """Return the tokens of a text from its beginning, with BOS where transformers or mistral-common would put it."""
        tokenizer = self.tokenizer
        start = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
        return start + tokenizer.encode(text)

    def _system(self, item: SuiteItem) -> list[Message]:
        """Return the suite's system turn. Raises ValueError if the item has one too."""
        if self.prompt.system is None:
            return []
        if item.messages[0].get("role") == "system":
            raise ValueError(f"{item.location}: both the item and the suite's prompt.system have a system message; remove one")
        return [{"role": "system", "content": self.prompt.system}]

    def _turns(self, item: SuiteItem) -> list[Message]:
        """Return solved examples and question as turns of a chat."""
        turns: list[Message] = []
        for example in self._examples(item):
            turns += [*self._question_turns(example), {"role": "assistant", "content": self._solution(example)}]
        turns += self._question_turns(item)
        preamble = self._preamble(item)
        if preamble:
            first = next(i for i, message in enumerate(turns) if message["role"] != "system")
            text = joined_texts(turns[first])
            if turns[first]["role"] != "user" or text is None:
                raise ValueError(f"{item.location}: preamble needs a user's turn with text at the start; remove prompt.preamble")
            turns[first] = {**turns[first], "content": preamble + text}
        return turns

    def _question_turns(self, item: SuiteItem) -> list[Message]:
        """Return the messages of a question, written by the template if there is one."""
        if self.prompt.template is None:
            return list(item.messages)
        return [{"role": "user", "content": self._written(item, self.prompt.template)}]

    def _written(self, item: SuiteItem, otherwise: str) -> str:
        """Write a question by the template. Raises ValueError if it is more than a single text."""
        question = joined_texts(item.messages[0]) if len(item.messages) == 1 else None
        if question is None or (item.tools and not self.prompt.chat):
            remedy = "leave prompt.template out" if self.prompt.chat else "set prompt.chat to true"
            raise ValueError(f"{item.location}: the item is a conversation, which needs a chat format; {remedy}")
        template = otherwise if self.prompt.template is None else self.prompt.template
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=False)]
        texts = {"question": question, "choices": "\n".join(lines), "category": item.category or ""}
        # In one pass, since a question may contain braces of its own.
        return re.sub(r"\{(question|choices|category)\}", lambda match: texts[match[1]], template)
