"""Split long texts at places where the pieces of a tokenizer certainly end, so that memory does not grow with the text.

Tokenizer libraries need about a second and 250 MB for a million characters at once. A text with more is encoded in parts, whose
ids put together are those of the whole text. Two properties of a tokenizer guarantee it:

- Its pattern of words ends a word before a space, and between a letter and a line break, and looks at nothing before a word.
- It has no pattern of words, as sentencepiece has none, but no piece of its vocabulary has a space behind another character, so
  that nothing is merged across the place before a space.

A stretch without such a place, as a line of fifty million times the same letter, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from moe_train.data.records.problem import Problem
from moe_train.machine.files import JsonObject

LONGEST_STRETCH = 1 << 20
"""Characters that a tokenizer is given at once, by default."""
_PART = 1 << 17
"""Characters in a part of a text that is split, if there is a place to split it."""
SPACE = "\u2581"
"""The character that stands for a space in the pieces of sentencepiece."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K_WORD = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
_TEKKEN = _O200K_WORD + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = frozenset([_GPT2, _CL100K, _CL100K.replace("{1,3}", ""), _TEKKEN])
"""Patterns of words that end a word before a space, and between a letter and a line break."""

# Neither side of a place is a mark of `huggingface.Marked`, since some tokenizers begin a text unlike what follows a control token.
# The other characters are white space to some libraries.
_INK = r"[^\s\ufdd0\u180e\u200b\ufeff\u2581]"
# Libraries disagree about letters that are new in Unicode, and what is no letter may be one word with the line breaks after it.
_OLD_LETTER = r"[A-Za-z0-9\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3]"
_BEFORE_SPACE = re.compile(rf"(?<={_INK})(?= )|(?<={_OLD_LETTER})(?=\n)")
_BETWEEN_WORDS = re.compile(rf"(?<={_INK})(?= {_INK})")
_INNER_SPACE = re.compile(r"\S\s")


class Stretches(NamedTuple):
    """Where the texts of a tokenizer may be split."""

    longest: int = LONGEST_STRETCH
    """Number of characters from which on a text is split, and that no part of it exceeds."""
    cut: re.Pattern[str] | None = None
    """Matches the empty text at the places where a text may be split; None if no place is certain."""
    dropped: int = 0
    """Number of characters at a cut that the tokenizer writes by itself at the beginning of a text."""

    def parts(self, text: str) -> list[str]:
        """Return the parts of a text, whose ids put together are those of the text.

        Raises:
            Problem: If a stretch of the text that cannot be split is too long.
        """
        if len(text) <= self.longest:
            return [text]
        parts = []
        start = 0
        size = min(_PART, self.longest // 2)
        while len(text) - start > self.longest:
            match = None if self.cut is None else self.cut.search(text, start + size, start + self.longest + 1)
            if match is None:
                raise self._too_long(len(text), start)
            parts.append(text[start : match.end()])
            start = match.end() + self.dropped
        parts.append(text[start:])
        return parts

    def _too_long(self, size: int, start: int) -> Problem:
        """Return the problem of a text of `size` characters whose part from `start` on cannot be split."""
        why = "splits texts nowhere for certain"
        if self.cut is not None:
            why = f"finds no space after character {start:,} where it could be split"
        message = f"the text has {size:,} characters; the tokenizer takes {self.longest:,} at once, and {why}"
        remedy = "shorten or drop it, or raise --longest-stretch (in a config: longest_stretch of data.tokenizer)"
        return Problem("stretch", message, remedy)


def words_of_pattern(longest: int, pattern: str) -> Stretches:
    """Return where texts may be split, given the pattern of a tokenizer's words."""
    return Stretches(longest, _BEFORE_SPACE if pattern in PATTERNS else None)


def words_of_vocabulary(longest: int, pieces: Iterable[str], adds_space: bool) -> Stretches:
    """Return where texts may be split, for a tokenizer that merges pieces wherever its vocabulary allows.

    Args:
        longest: See `Stretches`.
        pieces: The vocabulary, in which `SPACE` stands for a space.
        adds_space: Whether the tokenizer begins every text with a space, also one that has a space there.
    """
    across = re.compile(f"[^{SPACE}]{SPACE}")
    if any(across.search(piece) for piece in pieces):
        return Stretches(longest)
    return Stretches(longest, _BETWEEN_WORDS, 1 if adds_space else 0)


def stretches_of_json(longest: int, described: JsonObject) -> Stretches:
    """Return where texts may be split, given the content of a `tokenizer.json`."""
    model = described["model"]
    added = [token["content"] for token in described.get("added_tokens", ())]
    affixes = (model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"), model.get("dropout"))
    # A token that is recognized in plain text could contain a place.
    if model.get("type") != "BPE" or any(affixes) or any(_INNER_SPACE.search(text) for text in added):
        return Stretches(longest)
    normalizer = described.get("normalizer")
    words: JsonObject = described.get("pre_tokenizer") or {"type": "None"}
    if words["type"] == "Metaspace" and words.get("replacement") == SPACE and normalizer is None:
        # A text that begins with a space gets no other one.
        if words.get("prepend_scheme") in ("first", "always"):
            return words_of_vocabulary(longest, model["vocab"], adds_space=False)
    elif words["type"] == "None" and normalizer == _PREPENDED:
        return words_of_vocabulary(longest, model["vocab"], adds_space=True)
    elif normalizer in (None, {"type": "NFC"}):
        return words_of_pattern(longest, _pattern(words))
    return Stretches(longest)


_PREPENDED = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
"""The normalizer of tokenizers that transformers has converted from sentencepiece."""


def _pattern(pre_tokenizer: JsonObject) -> str:
    """Return the pattern of words of a byte-level tokenizer; empty if it is none, or adds a space to texts."""
    split: JsonObject = {}
    byte_level = pre_tokenizer
    if pre_tokenizer["type"] == "Sequence" and len(pre_tokenizer["pretokenizers"]) == 2:
        split, byte_level = pre_tokenizer["pretokenizers"]
    if byte_level["type"] != "ByteLevel" or byte_level.get("add_prefix_space", True):
        return ""
    uses_regex = byte_level.get("use_regex", True)
    if not split:
        return _GPT2 if uses_regex else ""
    isolated = split["type"] == "Split" and split.get("behavior") == "Isolated" and not split.get("invert")
    return split["pattern"].get("Regex", "") if isolated and not uses_regex else ""
