"""Find word sequences that records have in common with an evaluation set."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from moe_train.data.check.ngrams import Words, grams, words
from moe_train.data.records.normal_form import NormalRecord, messages_of, texts_of

OVERLAP_WORDS = 13
"""Number of consecutive common words that count as an overlap (GPT-3, arXiv:2005.14165, appendix C)."""


def compared_text(record: NormalRecord) -> str:
    """Return the text that distinguishes a record from others: without system text and tools, which many records share."""
    if isinstance(record, str):
        return record
    parts: list[object] = []
    for message in messages_of(record):
        if message.get("role") != "system":
            content = message.get("content")
            parts += texts_of(message) if isinstance(content, list) else [content]
            parts += [json.dumps(call, ensure_ascii=False, default=str) for call in message.get("tool_calls", ())]
    return "\n".join(text for text in parts if isinstance(text, str))


def overlap(texts: Words, held_out: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Find the texts that share a word sequence with the evaluation set.

    Args:
        texts: The words of the texts.
        held_out: Sorted unique hashes of the evaluation set's word sequences; None without one.

    Returns:
        Indices of the texts with an overlap, and indices of the hashes in `held_out` that were found.
    """
    empty = np.zeros(0, np.int64)
    if held_out is None or not len(held_out):
        return empty, empty
    hashes, offsets = grams(texts, OVERLAP_WORDS)
    # A hash beyond the last one would get an index past the end.
    indices = np.minimum(np.searchsorted(held_out, hashes), len(held_out) - 1)
    # `indices` says where each hash would stand in the sorted evaluation set; it is in the set if it stands there.
    hit = held_out[indices] == hashes
    text_of_hash = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return np.unique(text_of_hash[hit]), np.unique(indices[hit])


def held_out_hashes(records: Sequence[NormalRecord]) -> tuple[np.ndarray, np.ndarray]:
    """Return the hash of each word sequence of an evaluation set, and the index of the record that it is from."""
    hashes, offsets = grams(words([compared_text(record) for record in records]), OVERLAP_WORDS)
    return hashes, np.repeat(np.arange(len(records)), np.diff(offsets))
