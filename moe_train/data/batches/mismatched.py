"""Mismatched answers: for each labelled answer, the record whose answer is set against its prompt.

KTO measures with them how far the policy has moved from the reference (arXiv:2402.01306, section 4.1). The partner of a record is
the nearest one before it in its prepared set, cyclically, that has another prompt. So it depends on the data alone, and neither
on the batch, the number of processes, nor the seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_train.data.prepared.store import TokenStore

LABEL, PROMPT_HASH, PROMPT_TOKENS, SEGMENT_TOKENS = range(4)
"""Columns of `TokenStore.values` for labelled answers; see `data.chat.pairs_to_tokens`."""


def partners(store: TokenStore) -> np.ndarray:
    """Return (N,) the index of the example whose answer is set against the prompt of each example.

    Raises:
        ValueError: All prompts of the set are equal.
    """
    hashes = store.values[:, PROMPT_HASH]
    if (hashes == hashes[0]).all():
        raise ValueError(
            f"{store.where(0)}: all {len(hashes)} answers of the set have the same prompt, so none can be set against another "
            "prompt, as KTO needs; name files with several prompts in one source"
        )
    # Cyclically: where the prompt changes, the example before it is the partner; further equal prompts have the same partner.
    before = np.roll(np.arange(len(hashes)), 1)
    changes = np.flatnonzero(hashes != hashes[before])
    run = np.searchsorted(changes, np.arange(len(hashes)), side="right") - 1
    # Index -1, before the first change, is the run that goes around the end.
    return before[changes[run]]


def check_labels(stores: Sequence[TokenStore]) -> None:
    """Raise ValueError if all answers of all sources have the same label, so that nothing tells good from bad."""
    labels = np.concatenate([store.values[:, LABEL] for store in stores])
    if (labels == labels[0]).all():
        kind, missing = ("good", "false") if labels[0] else ("bad", "true")
        raise ValueError(
            f"{stores[0].where(0)}: this and all other answers ({len(labels)}) are labelled {kind}, so nothing tells good from "
            f"bad; add records with the label {missing}"
        )


def unpaired_lengths(store: TokenStore, lengths: np.ndarray, partner: np.ndarray) -> np.ndarray:
    """Return (N,) the positions of each example together with its mismatched segment; 0 where the example is left out."""
    prompt = store.values[:, PROMPT_TOKENS].astype(np.int64)
    answer = (store.values[:, SEGMENT_TOKENS]).astype(np.int64) - prompt
    return np.where(lengths > 0, lengths + prompt + answer[partner] - 1, 0)
