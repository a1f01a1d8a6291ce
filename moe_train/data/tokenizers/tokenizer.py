"""The interface of tokenizers, independent of the library that reads them.

Plain text never becomes control tokens: "</s>" in a document is encoded as characters, not as the end of a sequence. Only a
chat template (see `data.chat`) writes control tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from moe_train.data.pictures.rules import PictureRules
from moe_train.data.sound.rules import SoundRules

Span = tuple[int, int]
"""Start and end of a part of a text, or of its ids."""


class Tokenizer(Protocol):
    """A conversion of text to token ids and back."""

    files: tuple[Path, ...]
    """The files that an export has to include."""
    identity: str
    """A sha256 over these files."""
    vocab_size: int
    """The largest id plus one."""
    bos_id: int | None
    """Id of the token that begins a document; None if none does."""
    adds_bos: bool
    """Whether the tokenizer's own library (transformers, mistral-common) begins a plain text with `bos_id`."""
    eos_id: int
    """Id of the token that ends a document."""
    end_ids: tuple[int, ...]
    """Ids of the tokens that end a generation: `eos_id`, and the ends of turns that the model's files name."""
    chat_template: str | None
    """The text of the tokenizer's own chat template; None if it has none."""

    @property
    def media(self) -> PictureRules | SoundRules | None:
        """How pictures, or sound, become tokens; None if the tokenizer's files state no such rules."""
        ...

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of control tokens, which plain text never contains."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text, without any control token."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, as `encode` does."""
        ...

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Return the text of ids; control tokens are omitted, or written by name with `keep_special`."""
        ...


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ValueError if the tokenizer has ids for which the model's embedding (vocab_size rows) has no row."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.files[0]} has {tokenizer.vocab_size} ids, the model's vocab_size is {vocab_size}; "
            f"use the model's own tokenizer or a model.vocab_size of at least {tokenizer.vocab_size}"
        )


def hash_files(files: Sequence[Path]) -> str:
    """Return the identity of a tokenizer: a sha256 over the contents of its files, in order."""
    total = hashlib.sha256()
    for file in files:
        # Digests have one length, so bytes that move from one file to the next change the hash.
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
