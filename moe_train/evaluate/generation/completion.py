"""What a model generated, and where a generation stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moe_train.data.tokenizers.tokenizer import Tokenizer

StopReason = Literal["end_token", "stop_text", "max_tokens"]
"""Why a continuation ended: an end token, one of the caller's stop texts, or the largest number of tokens."""


class Completion(NamedTuple):
    """The continuation of a prompt."""

    tokens: list[int]
    """New tokens, without the token that ended the continuation; with the token in which a stop text ends."""
    logprobs: list[float]
    """Log-probability of each token under the model, before temperature and filters."""
    stop: StopReason


class Progress(NamedTuple):
    """Tokens that were generated for one request since its last `Progress`."""

    request: int
    """Index of the prompt."""
    tokens: list[int]
    logprobs: list[float]
    stop: StopReason | None
    """None if the continuation goes on."""


@dataclass(frozen=True)
class StopTexts:
    """Texts that end a continuation as soon as one of them occurs in it."""

    tokenizer: Tokenizer
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        if "" in self.texts:
            raise ValueError("a stop text is empty, which would end every continuation at once; leave it out")

    def tokens_until_stop(self, prompt: Sequence[int], tokens: Sequence[int], checked: int) -> int | None:
        """Return the number of tokens up to and including the one in which the first stop text ends; None if none occurs.

        Args:
            prompt: tokens of the prompt.
            tokens: tokens of the continuation.
            checked: number of tokens that are known to contain no stop text.
        """
        if not self.texts or self._end(decode_after(self.tokenizer, prompt, tokens)) is None:
            return None
        count = checked + 1
        while self._end(decode_after(self.tokenizer, prompt, tokens[:count])) is None:
            count += 1
        return count

    def before_stop(self, text: str) -> str:
        """Return a text up to its first stop text."""
        starts = [text.find(stop) for stop in self.texts if stop in text]
        return text[: min(starts)] if starts else text

    def _end(self, text: str) -> int | None:
        ends = [text.find(stop) + len(stop) for stop in self.texts if stop in text]
        return min(ends, default=None)


def decode_after(tokenizer: Tokenizer, before: Sequence[int], after: Sequence[int], *, keep_special: bool = False) -> str:
    """Decode `after` in the context of `before`, since some tokenizers drop the first space of a text.

    Args:
        tokenizer: the tokenizer.
        before: tokens of the prompt.
        after: tokens of the continuation.
        keep_special: whether control tokens are written by name.
    """
    prefix = tokenizer.decode(list(before), keep_special=keep_special)
    full_text = tokenizer.decode([*before, *after], keep_special=keep_special)
    if full_text.startswith(prefix):
        return full_text[len(prefix) :]
    return tokenizer.decode(list(after), keep_special=keep_special)
