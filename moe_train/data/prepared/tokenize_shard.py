"""Tokenize one shard of a source to disk, streaming in constant memory; a shard appears completely or not at all.

SHARD/tokens      uint16 or uint32: the ids of all examples, concatenated
      loss_mask   bool for each id; absent if all are trained on
      offsets     int64, one more than examples: example i is tokens[offsets[i]:offsets[i + 1]]
      turn_ends   int64, ascending: indices of ids before which an example of several turns with tools may end, its own end
                  excepted; absent if there are none
      answers     uint8 for each id (see `Example.answers`); absent unless examples have several segments
      segments    int32 for each example: its number of segments; absent with `answers`
      values      float64: the numbers of each example, one example after the other; absent if the record kind has none
      media       uint8: the files of all pictures, or clips of sound, one after the other; this and the next three are absent
                  without pictures and sound
      media_ends  int64 for each file: its end in `media`
      first_media int64, one more than examples: example i has the files first_media[i] to first_media[i + 1]
      media_units int32 for each example: the patches of its pictures, or the chunks of its sound
      origins     int64 pairs: for each example, the span of the shard and the line (or row) it is from
      facts.json  what the manifest records about the shard
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_train import config
from moe_train.data.chat.encode import FolderOfOrigin, encode
from moe_train.data.chat.example import Example
from moe_train.data.media import MediaRules
from moe_train.data.prepared.media_files import MediaFiles
from moe_train.data.prepared.shards import Shard
from moe_train.data.records.source import OpenSource, Origin
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import new_directory

ShardReport = Callable[[int, int], None]
"""A function that is called with the numbers of records and tokens since its last call."""
_FLUSH = 1 << 16  # ids buffered before they are written
_FLUSH_BYTES = 1 << 24  # bytes of pictures and sound buffered before they are written
_OF_MEDIA = frozenset({"media", "media_ends", "first_media", "media_units"})


class Recipe(NamedTuple):
    """Everything that decides how the records of a source become ids."""

    source: config.RecordSource
    """The config section of the source."""
    records: OpenSource
    """The source, opened."""
    tokenizer: Tokenizer
    template: str | None
    """The chat template; None if there is none."""


def write_shard(directory: Path, shard: Shard, recipe: Recipe, report: ShardReport) -> None:
    """Tokenize a shard into the new folder `directory`.

    Args:
        directory: The folder to create.
        shard: The shard.
        recipe: How to read and tokenize its records.
        report: A function that is called with the numbers of new records and tokens.

    Raises:
        ValueError: With its origin, for the first record that cannot be used.
    """
    source, records, tokenizer, template = recipe
    record = source.record
    media_files = MediaFiles()
    # Half the bytes to store and to fetch, where the vocabulary allows it.
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    per_span: list[tuple[int, int]] = []  # (records, tokens)
    empty = 0
    unread: Counter[str] = Counter()
    with new_directory(directory) as unfinished:
        with _uncollected(), _Arrays(unfinished, dtype, record.name != "text", tokenizer.media) as arrays:
            for i, span in enumerate(shard.spans):
                numbered = ((Origin(span.place, number), fields) for number, fields in records.read(span))
                num_records = 0
                reported_records = 0
                tokens_before = arrays.num_tokens
                reported_tokens = tokens_before
                folder_of = _folder_of(records)
                for origin, examples in encode(numbered, records.where, record, tokenizer, template, unread, folder_of):
                    num_records += 1
                    # A record without text gives no example, but counts as read.
                    empty += not examples
                    for example in examples:
                        arrays.add(example, (i, origin.number))
                        media_files.add(i, records.folder(span.place), example)
                    # Not for each record: with several processes a report takes a lock that they share.
                    if arrays.num_tokens - reported_tokens > _FLUSH:
                        report(num_records - reported_records, arrays.num_tokens - reported_tokens)
                        reported_records = num_records
                        reported_tokens = arrays.num_tokens
                report(num_records - reported_records, arrays.num_tokens - reported_tokens)
                per_span.append((num_records, arrays.num_tokens - tokens_before))
        files = sorted(unfinished.iterdir())
        facts = {
            "dtype": dtype,
            "examples": arrays.num_examples,
            "tokens": arrays.num_tokens,
            "loss_tokens": arrays.loss_tokens,
            "empty": empty,
            "unread": unread,
            "per_span": per_span,
            "sizes": {file.name: file.stat().st_size for file in files},
            "sha256": _hash(dtype, files),
        }
        if media_files.states:
            facts["media_files"] = media_files.states
        # Written last, and not part of the hash, which it contains.
        (unfinished / "facts.json").write_text(json.dumps(facts) + "\n")


def _folder_of(records: OpenSource) -> FolderOfOrigin:
    """Return the function from the origin of a record to the folder of its pictures and sound."""
    return lambda origin: records.folder(origin.place)


def _hash(dtype: str, files: Iterable[Path]) -> str:
    """Return the hash of a shard; it covers the names of files too, so that a mask cannot be taken for other numbers."""
    digest = hashlib.sha256(dtype.encode())
    for file in files:
        with file.open("rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def is_intact(directory: Path) -> bool:
    """Return whether a finished shard has the files, and they the bytes, that its facts state."""
    try:
        facts = json.loads((directory / "facts.json").read_bytes())
        return facts["sha256"] == _hash(facts["dtype"], [directory / name for name in sorted(facts["sizes"])])
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Disable the garbage collector: records contain no cycles, and it would scan thousands of them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Arrays:
    """The files of a shard, written some thousand ids at a time."""

    def __init__(self, directory: Path, dtype: str, masked: bool, rules: MediaRules | None) -> None:
        self._directory = directory
        self._rules = rules
        # `offsets` starts with 0, so that each example ends where the next one begins.
        self._buffers = {"tokens": array(np.dtype(dtype).char), "offsets": array("q", [0]), "origins": array("q")}
        if masked:
            self._buffers |= {"loss_mask": array("B"), "turn_ends": array("q")}
        self._buffers |= {"answers": array("B"), "segments": array("i")}
        self._buffers |= {
            "media": array("B"),
            "media_ends": array("q"),
            "first_media": array("q", [0]),
            "media_units": array("i"),
        }
        self._values = array("d")
        self._unused = {"turn_ends", "answers", "segments", "values", *_OF_MEDIA}
        self._num_files = 0
        self._media_bytes = 0
        self.num_examples = 0
        self.num_tokens = 0
        self.loss_tokens = 0

    def __enter__(self) -> _Arrays:
        self._files = {name: (self._directory / name).open("wb") for name in (*self._buffers, "values")}
        return self

    def add(self, example: Example, origin: tuple[int, int]) -> None:
        """Append an example and its origin (span, line)."""
        buffers = self._buffers
        buffers["tokens"].fromlist(example.tokens)
        if example.loss_mask is not None:
            buffers["loss_mask"].frombytes(bytes(example.loss_mask))
        if example.merged is not None and example.merged.may_be_cut and len(example.merged.ends) > 1:
            # Without the last end, which `offsets` holds.
            buffers["turn_ends"].extend(self.num_tokens + end for end in example.merged.ends[:-1])
            self._unused.discard("turn_ends")
        if example.answers is not None:
            buffers["answers"].frombytes(bytes(example.answers))
            buffers["segments"].append(len(example.tokens) - example.num_positions)
            self._unused -= {"answers", "segments"}
        self._add_media(example)
        if example.values:
            self._values.extend(example.values)
            self._unused.discard("values")
        self.num_examples += 1
        self.num_tokens += len(example.tokens)
        buffers["offsets"].append(self.num_tokens)
        buffers["origins"].extend(origin)
        if len(buffers["tokens"]) > _FLUSH or len(buffers["media"]) > _FLUSH_BYTES:
            self._flush()

    def _add_media(self, example: Example) -> None:
        """Append the pictures, or the clips of sound, of an example."""
        buffers = self._buffers
        for content in example.media:
            buffers["media"].frombytes(content)
            self._media_bytes += len(content)
            buffers["media_ends"].append(self._media_bytes)
            self._num_files += 1
            self._unused -= _OF_MEDIA
        buffers["first_media"].append(self._num_files)
        units = 0
        if example.media:
            assert self._rules is not None  # by which the pictures or the sound became tokens
            units = self._rules.room(example.tokens)
        buffers["media_units"].append(units)

    def _flush(self) -> None:
        """Write the buffered numbers to the files."""
        if "loss_mask" in self._buffers:
            self.loss_tokens += self._buffers["loss_mask"].count(1)
        else:
            self.loss_tokens += len(self._buffers["tokens"])
        for name, numbers in self._buffers.items():
            self._files[name].write(numbers)
            del numbers[:]
        self._files["values"].write(self._values)
        del self._values[:]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.ExitStack() as stack:
            for file in self._files.values():
                stack.enter_context(file)
            # After an error the folder is removed, so nothing is written any more.
            if kind is None:
                self._flush()
        # The files are opened before it is known whether any example has something for them.
        for name in self._unused & self._files.keys():
            (self._directory / name).unlink()
