"""The tokens of an item's prompt: a turn of a chat, or text to continue, after the solved examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moe_train import config
from moe_train.data.chat.conversation_to_tokens import render_prompt
from moe_train.data.records.normal_form import Message, joined_texts
from moe_train.data.records.problem import located
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.evaluate.suites.items import SuiteItem
from moe_train.evaluate.suites.likelihood import Continuation


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

    def tokens(self, item: SuiteItem) -> list[int]:
        """Return the tokens up to where the answer begins.

        Raises:
            ValueError: The item cannot be written in this form; the message names its file and line.
        """
        if self.prompt.chat:
            messages = [*self._system(item), *self._example_turns(), *item.messages]
            return located(item.location, render_prompt, messages, self.template, self.tokenizer, item.tools)
        return self._encoded(self._text(item))

    def continuation(self, item: SuiteItem, choice: str) -> Continuation:
        """Return the tokens of a prompt and of a choice that follows it.

        A text and its continuation are tokenized together, since a token may join a word with the space before it: the white space
        that ends the prompt is counted to the continuation (as lm-evaluation-harness counts it).

        Raises:
            ValueError: As for `tokens`; also if the choice has no tokens of its own.
        """
        if self.prompt.chat:
            prompt = self.tokens(item)
            text = self.tokenizer.encode(choice)
        else:
            context = self._text(item)
            prompt = self._encoded(context.rstrip())
            text = self._encoded(context + choice)[len(prompt) :]
        if not text:
            raise ValueError(f"{item.location}: the choice {choice!r} has no tokens; write what the model is to say")
        return Continuation(prompt, text)

    def _text(self, item: SuiteItem) -> str:
        """Return the text of solved examples and question."""
        examples = "".join(f"{self._written(example)}{example.answers[0]}{self.prompt.separator}" for example in self.examples)
        return examples + self._written(item)

    def _encoded(self, text: str) -> list[int]:
        """Return the tokens of a text from its beginning, BOS included where the tokenizer has one."""
        start = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return start + self.tokenizer.encode(text)

    def _system(self, item: SuiteItem) -> list[Message]:
        """Return the suite's system turn. Raises ValueError if the item has one too."""
        if self.prompt.system is None:
            return []
        if item.messages[0].get("role") == "system":
            raise ValueError(f"{item.location}: both the item and the suite's prompt.system have a system message; remove one")
        return [{"role": "system", "content": self.prompt.system}]

    def _example_turns(self) -> list[Message]:
        """Return the solved examples as turns of a chat."""
        turns: list[Message] = []
        for example in self.examples:
            turns += [*example.messages, {"role": "assistant", "content": example.answers[0]}]
        return turns

    def _written(self, item: SuiteItem) -> str:
        """Write a question by the template. Raises ValueError if it is more than a single text."""
        question = joined_texts(item.messages[0]) if len(item.messages) == 1 and not item.tools else None
        if question is None:
            raise ValueError(f"{item.location}: the item is a conversation, which needs a chat format; set prompt.chat to true")
        # Not str.format, since a template or a question may contain braces of its own.
        return self.prompt.template.replace("{question}", question)
