"""A model that continues texts and answers conversations: opened once, for the commands that generate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe_train import config
from moe_train.checkpoint.model_dir import open_model
from moe_train.data.chat.chat_date import date_of_data, dated
from moe_train.data.chat.conversation_to_tokens import check_effort_option, load_template, rendered_prompt
from moe_train.data.chat.example import RenderedPrompt
from moe_train.data.media import check_file, media_of_piece
from moe_train.data.records.media_parts import MediaKind
from moe_train.data.records.normal_form import Message
from moe_train.data.records.problem import checked_text
from moe_train.evaluate.generation.batch import ContinuationPlan
from moe_train.evaluate.generation.completion import StopReason, StopTexts
from moe_train.evaluate.generation.generator import Generator, check_lengths
from moe_train.evaluate.generation.json_schema import JsonSchema
from moe_train.evaluate.generation.programs import BLOCK_TOKENS
from moe_train.evaluate.generation.sampling import Sampling
from moe_train.evaluate.generation.text_stream import TextStream
from moe_train.model.parameters import combine


@dataclass(frozen=True)
class ChatSettings:
    """How conversations are rendered."""

    template: str | None = None
    """A jinja file, its text, or a name; None for the template of the run or of the model's tokenizer."""
    reasoning_effort: str | None = None
    """How long the model may think; None for the default of the tokenizer or template."""
    system: str | None = None
    """Text of a system message that is put before each conversation; None for none."""
    tools: tuple[dict[str, Any], ...] = ()
    """Tools of conversations that state none."""


class TextPart(NamedTuple):
    """Text that was generated for a prompt since its last part."""

    prompt: int
    """Index of the prompt."""
    text: str
    tokens: list[int]
    logprobs: list[float]
    stop: StopReason | None
    """None if the continuation goes on."""


class TextGenerator:
    """A run or a model with its tokenizer and chat template, which continues texts and answers conversations.

    The weights are loaded with the first prompt, so that prompts are checked before.

    Args:
        directory: the run or model.
        chat: how conversations are rendered.

    Raises:
        FileNotFoundError: there is no model or no tokenizer.
        ValueError: the parts do not fit together, or the template has no such reasoning effort.
    """

    def __init__(self, directory: str | Path, chat: ChatSettings = ChatSettings()) -> None:
        self._opened = open_model(directory)
        self._chat = chat
        self._generator: Generator | None = None
        self._has_tower = False
        self.tokenizer = self._opened.tokenizer
        template = self._opened.chat_template if chat.template is None else load_template(chat.template, self.tokenizer)
        if template is not None:
            data = self._opened.run.data if self._opened.run else None
            # The date of the training data, so that the prompt has the tokens that training saw.
            template = dated(template, date_of_data(data if isinstance(data, config.RunData) else None))
        check_effort_option(chat.reasoning_effort, template, self.tokenizer)
        self._template = template

    @property
    def max_seq_len(self) -> int:
        """Largest number of tokens of a prompt and its continuation."""
        return self._opened.model.max_seq_len

    def conversation_tokens(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> RenderedPrompt:
        """Render a conversation up to where the assistant's next turn begins.

        Args:
            messages: the messages.
            tools: tools of this conversation; () for those of the settings.

        Raises:
            ValueError: the conversation has two system messages, or the template cannot write it.
        """
        conversation = list(messages)
        if self._chat.system is not None:
            if conversation and conversation[0].get("role") == "system":
                raise ValueError("both --system and the conversation have a system message; leave one of them out")
            system = checked_text(self._chat.system, "the system message")
            conversation.insert(0, {"role": "system", "content": system})
        return rendered_prompt(
            conversation, self._template, self.tokenizer, tools or self._chat.tools, reasoning_effort=self._chat.reasoning_effort
        )

    def text_tokens(self, text: str) -> RenderedPrompt:
        """Return the tokens of the beginning of a text."""
        start = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return RenderedPrompt(start + self.tokenizer.encode(checked_text(text, "the prompt")))

    def check(self, prompts: Sequence[RenderedPrompt], max_tokens: int, names: Sequence[str] | None = None) -> None:
        """Raise ValueError if a prompt is empty, too long for `max_tokens` more, or has pictures or sound in vain."""
        check_lengths([prompt.tokens for prompt in prompts], max_tokens, self._opened.model, names)
        if any(prompt.media for prompt in prompts):
            self._opened.check_media()

    def check_file(self, kind: MediaKind, file: str) -> None:
        """Raise ValueError if a file is no picture or no sound that can be used, or the model takes none."""
        self._opened.check_media(kind)
        assert self.tokenizer.media is not None  # as has been checked
        check_file(file, self.tokenizer.media)

    def stream(
        self,
        prompts: Sequence[RenderedPrompt],
        sampling: Sampling,
        stop: Sequence[str] = (),
        schema: Mapping[str, Any] | None = None,
        block_tokens: int = BLOCK_TOKENS,
    ) -> Iterator[TextPart]:
        """Continue prompts, and yield their texts block by block.

        Args:
            prompts: the prompts.
            sampling: how they are continued; the tokenizer's end tokens are added to its own.
            stop: texts that end a continuation, which ends before them.
            schema: JSON schema that every continuation fits; None for any text.
            block_tokens: number of tokens of a block.

        Raises:
            ValueError: a prompt is empty or too long, or the schema cannot be compiled.
        """
        self.check(prompts, sampling.max_tokens)
        end_ids = tuple({*sampling.end_ids, *self.tokenizer.end_ids})
        sampling = replace(sampling, end_ids=end_ids)
        stop_texts = StopTexts(self.tokenizer, tuple(stop)) if stop else None
        plan = ContinuationPlan(sampling, stop_texts, None if schema is None else JsonSchema(schema, self.tokenizer))
        texts = [TextStream(self.tokenizer, prompt.tokens, stop_texts) for prompt in prompts]
        media = [media_of_piece(prompt.media, self.tokenizer.media) for prompt in prompts]
        with jax.set_mesh(self._opened.mesh):
            generator = self._loaded(any(of_prompt is not None for of_prompt in media))
            tokens = [prompt.tokens for prompt in prompts]
            parts = generator.stream(tokens, plan, block_tokens=block_tokens, media=media)
        while True:
            # The mesh is in force for one block at a time, and not while the caller handles its text.
            with jax.set_mesh(self._opened.mesh):
                part = next(parts, None)
            if part is None:
                return
            text = texts[part.request].add(part.tokens, is_last=part.stop is not None)
            yield TextPart(part.request, text, part.tokens, part.logprobs, part.stop)

    def _loaded(self, with_tower: bool) -> Generator:
        """Return the generator, after loading the weights if they are not loaded yet; the mesh has to be in force."""
        if self._generator is None or (with_tower and not self._has_tower):
            self._has_tower = with_tower
            structure, weights, _ = self._opened.load_with_tower() if with_tower else self._opened.load_with_step()
            transformer = combine(structure, weights)
            self._generator = Generator(
                transformer, self._opened.model, self._opened.mesh, self._opened.compute.dtype, release=True
            )
        return self._generator
