"""Pictures and sound in the comparison of records: by the content of their files, whatever these are called."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence

import numpy as np

from moe_train.data.check.duplicates import Fingerprints, fingerprints
from moe_train.data.check.ngrams import Words
from moe_train.data.records.data_urls import data_of
from moe_train.data.records.media import media_parts, references_of, shows_media
from moe_train.data.records.normal_form import NormalRecord, messages_of
from moe_train.data.records.problem import Problem


def by_content(record: NormalRecord) -> NormalRecord:
    """Return a record with the hash of each picture's or clip's file in the place of its reference.

    A file that cannot be read, which another rule names, keeps its reference.
    """
    if not shows_media(record):
        return record
    hashed = copy.deepcopy(record)
    for message in messages_of(hashed):
        for part in media_parts(message):
            part[part["type"]] = _digest(part[part["type"]])
    return hashed


def _digest(reference: str) -> str:
    try:
        content = data_of(reference, "", "", "")
    except Problem:
        return reference
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def media_hash(hashed: NormalRecord) -> int:
    """Return a 64-bit hash of the pictures and the sound of a record as `by_content` returns it; 0 without either."""
    references = references_of(messages_of(hashed))
    if not references:
        return 0
    return int.from_bytes(hashlib.blake2b("\n".join(references).encode(), digest_size=8).digest(), "little")


def fingerprints_of(records: Sequence[NormalRecord], texts: Words) -> Fingerprints:
    """Return the fingerprints of records.

    Args:
        records: the records, whose pictures and sound are compared by content.
        texts: the words that decide similarity.
    """
    hashed = [by_content(record) for record in records]
    media = np.array([media_hash(record) for record in hashed], np.uint64)
    return fingerprints([_whole_text(record) for record in hashed], texts, media)


def _whole_text(record: NormalRecord) -> str:
    """Return a text that is equal only for exact duplicates."""
    if isinstance(record, str):
        return record
    # Sorted, since the order of keys in a file does not tell records apart.
    return json.dumps(record, sort_keys=True, default=str)
