"""What a tokenizer can do, whichever library reads it.

Plain text never becomes control tokens: "</s>" inside a document is five characters, not the end of a sequence. Only a chat
template (see `data.chat`) writes control tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

Span = tuple[int, int]
"""Start and end of a part of a text, or of its ids."""


class Tokenizer(Protocol):
    """Text to ids and back.

    files: what an export has to carry. identity: sha256 over those files. vocab_size: the largest id plus one. bos_id and
    eos_id: of the tokens that begin (None: nothing does) and end a document.
    """

    files: tuple[Path, ...]
    identity: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    chat_template: str | None

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of control tokens, which no plain text has."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without any control token."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        ...

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """The text of ids; control tokens are left out, or written by name where `keep_special` is set."""
        ...


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ValueError if the tokenizer has ids for which the model's embedding (vocab_size rows) has no row."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.files[0]} has {tokenizer.vocab_size} ids, the model's vocab_size is {vocab_size}; "
            f"use the model's own tokenizer or a model.vocab_size of at least {tokenizer.vocab_size}"
        )


def hash_files(files: Sequence[Path]) -> str:
    """The identity of a tokenizer: a sha256 over the contents of its files, in order."""
    total = hashlib.sha256()
    for file in files:
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
