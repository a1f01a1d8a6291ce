"""The form of records that a tokenizer requires; `rules` checks it."""

from __future__ import annotations

import re
from typing import NamedTuple

from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.data.tokenizers.tokenizer import Tokenizer


class Requirements(NamedTuple):
    """The form of records that a tokenizer requires."""

    control: re.Pattern[str]
    """A pattern for control tokens, which no text should contain."""
    nine_character_ids: bool
    """Whether the ids of calls must have nine characters."""
    reasons: bool = False
    """Whether reasoning is written with the token [THINK]."""


def requirements_of(tokenizer: Tokenizer, template: str | None) -> Requirements:
    """Return the form that records should have for a tokenizer and its chat template."""
    if isinstance(tokenizer, Mistral):
        text = tokenizer.finetuning.instruct_tokenizer.tokenizer
        special = {text.id_to_piece(i) for i in range(text.n_words) if text.is_special(i)}
        # v1 writes its turns as plain text, so [INST] acts as a control token there without being one.
        special = {token for token in special if not re.fullmatch(r"\[control_\d+\]|<SPECIAL_\d+>", token)} | {"[INST]", "[/INST]"}
        version = int(re.sub(r"\D.*", "", text.version.value.lstrip("v")) or 0)
        # mistral-common accepts only ids of nine characters from v3 on, and any id from v13 on, which does not encode them.
        return Requirements(_any_of(special), 3 <= version < 13, "[THINK]" in special)
    assert isinstance(tokenizer, HuggingFace)
    # Mistral's chat templates, known by their token for calls, refuse ids of another length.
    special = set(tokenizer.special_tokens)
    return Requirements(_any_of(special), "[TOOL_CALLS]" in (template or ""), "[THINK]" in special)


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the tokens, the longest first."""
    # Longest first, since an alternation takes the first that matches; an empty one would match everywhere, and (?!) nowhere.
    return re.compile("|".join(map(re.escape, sorted(tokens, key=lambda token: (-len(token), token)))) or "(?!)")
