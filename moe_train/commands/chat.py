"""A conversation with a model, turn by turn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moe_train.commands.text_generator import ChatSettings, TextGenerator
from moe_train.data.records.media_parts import MediaKind
from moe_train.data.records.normal_form import Message
from moe_train.evaluate.generation.sampling import Sampling

BLOCK_TOKENS = 8
"""Number of tokens that are generated before they are shown."""


class Chat:
    """A conversation with a run or a model.

    Args:
        directory: the run or model.
        sampling: how answers are generated.
        settings: how the conversation is rendered.

    Raises:
        FileNotFoundError: there is no model or no tokenizer.
        ValueError: the parts do not fit together, or the chat format cannot write the settings.
    """

    def __init__(self, directory: str | Path, sampling: Sampling, settings: ChatSettings) -> None:
        self._generator = TextGenerator(directory, settings)
        self._sampling = sampling
        self.messages: list[Message] = []
        """The turns so far, without the system message of the settings."""
        self.media: list[dict[str, str]] = []
        """The pictures and the sound of the next question, as parts of its content."""
        # A template that cannot write the system message or the tools fails before the first question.
        self._generator.conversation_tokens([{"role": "user", "content": "Hello"}])

    def attach(self, kind: MediaKind, file: str) -> None:
        """Add a picture or sound to the next question, before its text.

        Raises:
            ValueError: the file cannot be used, or the model takes none of this kind.
        """
        path = str(Path(file).expanduser().absolute())
        self._generator.check_file(kind, path)
        self.media.append({"type": kind.part, kind.part: path})

    def answer(self, text: str) -> Iterator[str]:
        """Put a question, and yield the answer piece by piece; both are added to the conversation when the answer is complete.

        Raises:
            ValueError: the conversation has become too long, or the question is not text; the conversation stays as it was.
        """
        question: Message = {"role": "user", "content": text}
        if self.media:
            question = {"role": "user", "content": [*self.media, {"type": "text", "text": text}]}
        prompt = self._generator.conversation_tokens([*self.messages, question])
        if len(prompt.tokens) + self._sampling.max_tokens > self._generator.max_seq_len:
            raise ValueError(
                f"the conversation has {len(prompt.tokens)} tokens; with {self._sampling.max_tokens} new ones it exceeds the "
                f"model's max_seq_len {self._generator.max_seq_len}; begin a new one with /reset, or lower --max-tokens"
            )
        answer = ""
        for part in self._generator.stream([prompt], self._sampling, block_tokens=BLOCK_TOKENS):
            answer += part.text
            yield part.text
        self.messages += [question, {"role": "assistant", "content": answer}]
        self.media.clear()

    def reset(self) -> None:
        """Begin a new conversation."""
        self.messages.clear()
        self.media.clear()
