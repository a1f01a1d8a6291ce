"""The text of a continuation while it is generated: only what later tokens cannot change."""

from __future__ import annotations

from collections.abc import Sequence

from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.evaluate.generation.completion import StopTexts, decode_after


class TextStream:
    """The text of a growing list of tokens.

    Withheld are incomplete characters, whose other bytes are in tokens to come, and what may be the beginning of a stop text.

    Args:
        tokenizer: the tokenizer.
        prompt: tokens of the prompt.
        stop_texts: texts that end the continuation; the text ends before the first of them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop_texts: StopTexts | None = None) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._stop_texts = stop_texts
        self._tokens: list[int] = []
        self._length = 0

    def add(self, tokens: Sequence[int], *, is_last: bool) -> str:
        """Add tokens, and return the text that has become certain; with the last tokens, all that remains."""
        self._tokens += tokens
        text = decode_after(self._tokenizer, self._prompt, self._tokens)
        if self._stop_texts is not None:
            text = self._stop_texts.before_stop(text)
        if not is_last:
            text = text.rstrip("\ufffd")
            if self._stop_texts is not None:
                text = text[: len(text) - self._begun_stop(text)]
        new = text[self._length :]
        self._length = max(self._length, len(text))
        return new

    def _begun_stop(self, text: str) -> int:
        """Return the length of the longest end of a text with which a stop text begins."""
        assert self._stop_texts is not None
        longest = 0
        for stop in self._stop_texts.texts:
            for length in range(1, min(len(stop), len(text) + 1)):
                if text.endswith(stop[:length]):
                    longest = max(longest, length)
        return longest
