"""Answers that fit a JSON schema: masks of the tokens that may come next, made on the host by llguidance (extra `schema`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.data.tokenizers.tokenizer import Tokenizer


class JsonSchema:
    """A JSON schema, compiled for a tokenizer.

    Args:
        schema: the schema.
        tokenizer: the model's tokenizer, whose end tokens end an answer.

    Raises:
        ValueError: the schema cannot be compiled, or llguidance is not installed.
    """

    def __init__(self, schema: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise ValueError("a JSON schema needs the package llguidance; install it: bash launch/install.sh schema") from error
        self._tokenizer = _for_llguidance(tokenizer)
        try:
            # Without white space between tokens, which a model may otherwise repeat for ever.
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults={"whitespace_flexible": False})
            if isinstance(tokenizer, Mistral) and tokenizer.adds_space:
                # The model has learnt texts that begin with a space.
                grammar = llguidance.LLMatcher.grammar_from_lark(_AFTER_SPACE % json.dumps(_without_space(schema)))
        except ValueError as error:
            raise ValueError(f"the JSON schema cannot be compiled: {_one_line(str(error))}; correct it") from error
        self._matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if self._matcher.is_error():
            raise ValueError(f"the JSON schema cannot be compiled: {_one_line(self._matcher.get_error())}; correct it")

    def begin(self) -> SchemaState:
        """Return the state of an answer at its beginning."""
        return SchemaState(self._matcher.deep_copy())


class SchemaState:
    """How much of an answer has been written."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, vocab_size: int) -> np.ndarray:
        """Return which of the model's tokens may come next, (V,) bool."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed_V = np.zeros(vocab_size, bool)
        known = np.unpackbits(bits, bitorder="little")[:vocab_size]
        allowed_V[: len(known)] = known
        return allowed_V

    def add(self, tokens: Sequence[int]) -> None:
        """Continue the answer with tokens, which were allowed."""
        for token in tokens:
            if not self._matcher.consume_token(token):
                raise AssertionError(f"token {token} was not allowed: {self._matcher.get_error()}")


_AFTER_SPACE = 'start: " "? answer\nanswer: %%json %s'
"""Grammar, in the language of llguidance, of an answer that may begin with a space."""


def _without_space(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema with llguidance's own option for no white space between tokens."""
    return {**schema, "x-guidance": {"whitespace_flexible": False}}


_BREAK = "\n"
"""Text that sentencepiece joins with none that follows."""


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _for_llguidance(tokenizer: Tokenizer) -> Any:
    """Return the tokenizer as llguidance takes it."""
    from llguidance import LLTokenizer, TokenizerWrapper

    if isinstance(tokenizer, HuggingFace):
        return LLTokenizer(tokenizer.to_json(), n_vocab=tokenizer.vocab_size, eos_token=list(tokenizer.end_ids))
    assert isinstance(tokenizer, Mistral)
    return LLTokenizer(TokenizerWrapper(_Bytes(tokenizer)), n_vocab=tokenizer.vocab_size, eos_token=list(tokenizer.end_ids))


class _Bytes:
    """A Mistral tokenizer with the attributes that llguidance asks for."""

    def __init__(self, tokenizer: Mistral) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.control_ids)
        self.tokens = tokenizer.bytes_of(range(tokenizer.vocab_size))
        for number in self.special_token_ids:
            # Control tokens have no bytes of their own; as llguidance marks them, no text is taken for one.
            self.tokens[number] = b"\xff<control_%d>" % number

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text that stands inside another one, so that no space is put before it."""
        if not self._tokenizer.adds_space:
            return self._tokenizer.encode(text)
        # A line break is a token of its own, which the space goes before.
        before = self._tokenizer.encode(_BREAK)
        ids = self._tokenizer.encode(_BREAK + text)
        assert ids[: len(before)] == before, f"{self._tokenizer.path.name} joins a line break with {text!r}"
        return ids[len(before) :]
