"""A prepared set: token ids on local disk or in a bucket, accessed by the index of their example."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_train.data.batches.batch import StoredPiece
from moe_train.data.media import MediaOfPiece, media_of_piece
from moe_train.data.prepared import manifest
from moe_train.data.prepared.folder import ArrayPart, File, RemoteFolder, StoredArray, open_folder
from moe_train.data.prepared.manifest import Manifest, ShardEntry
from moe_train.data.prepared.teacher_reader import TeacherReader
from moe_train.data.prepared.verify import verify_set
from moe_train.data.records.source import OpenSource, Origin, numbered

log = logging.getLogger(__name__)
_SEARCHED_AT_ONCE = 1 << 22  # tokens that are searched together


class ExampleSlice(NamedTuple):
    """Positions start to start + length of an example; at each position one id is the input and the next one the target."""

    example: int
    start: int
    length: int


class _ShardArrays(NamedTuple):
    """The arrays of a shard, read on demand."""

    tokens: StoredArray
    mask: StoredArray | None
    """None if all tokens are trained on."""
    answers: StoredArray | None
    """None if examples are single segments."""
    offsets: StoredArray

    @property
    def by_id(self) -> list[StoredArray]:
        """The arrays with one element for each id, in the order in which they are read."""
        return [array for array in (self.tokens, self.mask, self.answers) if array is not None]


class _LocatedPiece(NamedTuple):
    """A piece of an example: ids start to stop (exclusive) of its shard."""

    shard: _ShardArrays
    start: int
    stop: int

    def part(self, array: StoredArray) -> ArrayPart:
        """Return the part of one of the shard's arrays that belongs to the piece."""
        return ArrayPart(array, self.start, self.stop)


class TokenStore:
    """A prepared set of N examples, whose ids are read on demand.

    Args:
        path: The folder, local or in a bucket.
        source: The records as they are now, for messages; None to use what the manifest says about them.
        cache_mib: MiB of a bucket's files that stay in memory.
        vocab_size: Number of ids of the tokenizer; None to accept any id.

    Attributes:
        manifest: The description of the set.
    """

    def __init__(
        self, path: str | Path, source: OpenSource | None = None, cache_mib: int = 1024, vocab_size: int | None = None
    ) -> None:
        self.path = str(path)
        self._vocab_size = vocab_size
        self._folder = open_folder(self.path, cache_mib)
        try:
            text = self._folder.text(manifest.MANIFEST)
        except FileNotFoundError:
            message = f"{self.path} holds no {manifest.MANIFEST}; name a folder that `moe-train data prepare` made"
            raise FileNotFoundError(message) from None
        self.manifest: Manifest = manifest.read_manifest(text, f"{self.path}/{manifest.MANIFEST}")
        self._source = source
        teacher = self.manifest.teacher
        self._teacher = None if teacher is None else TeacherReader(self._folder, self.manifest, teacher)
        counts = [shard.examples for shard in self.manifest.shards]
        self._first = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))  # first example of each shard
        self._open = functools.lru_cache(256)(self._shard)  # bounds the number of open files

    def __len__(self) -> int:
        """Return the number of examples."""
        return self.manifest.examples

    def verify(self, memory: str | Path) -> None:
        """Raise ValueError if the files have other bytes than the manifest states; hashes are remembered in `memory`."""
        verify_set(self._folder, self.manifest, Path(memory))

    def warn_of_cache(self, window: int | None) -> None:
        """Warn if the records that are shuffled together do not fit into the cache.

        In that case almost every record is fetched with a block of its own.

        Args:
            window: Positions that are shuffled together; None for all.
        """
        if not isinstance(self._folder, RemoteFolder):
            return
        size = 0
        for shard in self.manifest.shards:
            size += shard.sizes.get("tokens", 0) + shard.sizes.get("loss_mask", 0)
        bytes_per_token = size / self.manifest.tokens
        # Two windows are in use at once when a batch crosses from one window to the next.
        shuffled_bytes: float = size
        if window is not None:
            shuffled_bytes = min(size, 2 * window * bytes_per_token)
        if shuffled_bytes > self._folder.cache_bytes:
            log.warning(
                "%s: %d MiB of records are shuffled at a time, and %d MiB stay in memory, so that most records are fetched with a "
                "MiB around them; set data.shuffle_tokens to %d at most, or cache_mib to %d",
                *(self.path, shuffled_bytes / 2**20, self._folder.cache_bytes / 2**20),
                *(self._folder.cache_bytes / 2 / bytes_per_token, math.ceil(shuffled_bytes / 2**20)),
            )

    def lengths(self) -> np.ndarray:
        """Return (N,) the positions that each example takes in a row.

        These are its ids without the last one of each segment, which is only a target.
        """
        offsets = self._folder.read_whole([_file(shard, "offsets", "int64") for shard in self.manifest.shards])
        return np.concatenate([np.diff(ends) for ends in offsets]) - self.segments

    @functools.cached_property
    def segments(self) -> np.ndarray:
        """(N,) the number of segments of each example."""
        return self._counts("segments", 1)

    @functools.cached_property
    def media_units(self) -> np.ndarray:
        """(N,) the number of patches of the pictures, or of chunks of the sound, of each example."""
        return self._counts("media_units", 0)

    def _counts(self, name: str, otherwise: int) -> np.ndarray:
        """Return (N,) a number of each example; in shards without a file of that name it is `otherwise`."""
        stored = [shard for shard in self.manifest.shards if name in shard.sizes]
        arrays = iter(self._folder.read_whole([_file(shard, name, "int32") for shard in stored]))
        parts = []
        for shard in self.manifest.shards:
            parts.append(next(arrays) if name in shard.sizes else np.full(shard.examples, otherwise, np.int32))
        return np.concatenate(parts)

    @functools.cached_property
    def values(self) -> np.ndarray:
        """(N, number of values) the numbers that belong to each example; no columns if the record kind has none."""
        stored = [shard for shard in self.manifest.shards if shard.examples and "values" in shard.sizes]
        if not stored:
            return np.zeros((len(self), 0))
        arrays = self._folder.read_whole([_file(shard, "values", "float64") for shard in stored])
        return np.concatenate([x.reshape(shard.examples, -1) for x, shard in zip(arrays, stored, strict=True)])

    def fitting_lengths(self, lengths: np.ndarray, seq_len: int) -> np.ndarray:
        """Shorten each example of several turns with tools that does not fit into a row to the turns that do.

        Args:
            lengths: (N,) what `lengths` returns.
            seq_len: Positions in a row.

        Returns:
            (N,) the shortened lengths; an example of which no turn fits, or of any other kind, keeps its length.
        """
        fitting = lengths.copy()
        for first, shard in zip(self._first[:-1].tolist(), self.manifest.shards, strict=True):
            # No conversation with tools in this shard has more than one turn.
            if "turn_ends" not in shard.sizes:
                continue
            # `turn_ends` and `offsets` count ids from the start of the shard, so they can be compared directly.
            offsets, ends = self._folder.read_whole([_file(shard, "offsets", "int64"), _file(shard, "turn_ends", "int64")])
            overlong = np.flatnonzero(np.diff(offsets) - 1 > seq_len)
            starts = offsets[overlong]
            # A row of seq_len positions holds one id more, since the last id is only a target.
            last_ends = np.searchsorted(ends, starts + seq_len + 1, side="right") - 1
            # Not positive if the last turn that ends early enough is one of an earlier example.
            shortened = np.where(last_ends >= 0, ends[last_ends], 0) - starts - 1
            fitting[first + overlong[shortened > 0]] = shortened[shortened > 0]
        return fitting

    def _shard(self, number: int) -> _ShardArrays:
        """Open the arrays of a shard."""
        shard = self.manifest.shards[number]
        mask = None
        if "loss_mask" in shard.sizes:
            mask = self._folder.array(_file(shard, "loss_mask", "bool"))
        answers = None
        if "answers" in shard.sizes:
            answers = self._folder.array(_file(shard, "answers", "uint8"))
        tokens = self._folder.array(_file(shard, "tokens", self.manifest.dtype))
        return _ShardArrays(tokens, mask, answers, self._folder.array(_file(shard, "offsets", "int64")))

    def read(self, pieces: Sequence[ExampleSlice], with_media: bool = True) -> list[StoredPiece]:
        """Return the ids of each piece, one more than positions for each segment, and what belongs to them.

        Args:
            pieces: The pieces.
            with_media: Whether pictures and sound are decoded.
        """
        located = self._located(pieces)
        # One read for all arrays together, so that the blocks of a bucket are fetched in parallel.
        parts: list[ArrayPart] = []
        for piece in located:
            parts += [piece.part(array) for array in piece.shard.by_id]
        arrays = iter(self._folder.read(parts))
        values = self.values
        read: list[StoredPiece] = []
        # In the order in which `parts` was filled.
        for piece, slice_ in zip(located, pieces, strict=True):
            tokens = next(arrays)
            self._check_ids(slice_.example, tokens)
            mask = None if piece.shard.mask is None else next(arrays)
            answers = None if piece.shard.answers is None else next(arrays)
            own_values = values[slice_.example] if values.shape[1] else None
            media = self._media(slice_.example) if with_media else None
            read.append(StoredPiece(tokens, mask, answers, own_values, media=media))
        if self._teacher is None:
            return read
        places = []
        counts = []
        for slice_, content in zip(pieces, read, strict=True):
            places.append(self._place_in_shards(slice_.example))
            counts.append(len(content.tokens) - 1 if content.loss_mask is None else int(content.loss_mask[1:].sum()))
        teacher = self._teacher.read([piece.start for piece in pieces], places, counts)
        return [content._replace(teacher=values) for content, values in zip(read, teacher, strict=True)]

    def _media(self, example: int) -> MediaOfPiece | None:
        """Return the patches of an example's pictures, or the spectrograms of its sound; None if it has neither."""
        if self.manifest.media is None:
            return None
        return media_of_piece(self.media_files(example), self.manifest.media)

    def media_files(self, example: int) -> list[bytes]:
        """Return the files of an example's pictures or sound, in the order of their tokens."""
        number, index = self._place_in_shards(example)
        shard = self.manifest.shards[number]
        if "media" not in shard.sizes:
            return []
        first, end = (int(x) for x in self._folder.array(_file(shard, "first_media", "int64"))[index : index + 2])
        if first == end:
            return []
        # The end of the file before the first one is where that begins.
        bounds = self._folder.array(_file(shard, "media_ends", "int64"))[max(first - 1, 0) : end].tolist()
        starts = bounds if first else [0, *bounds]
        content = self._folder.array(_file(shard, "media", "uint8"))
        return [bytes(content[start:stop]) for start, stop in itertools.pairwise(starts)]

    def _place_in_shards(self, example: int) -> tuple[int, int]:
        """Return the shard of an example, and its index there."""
        # side="right", since an example that is the first of its shard belongs to that shard, and empty shards are skipped.
        number = int(np.searchsorted(self._first, example, side="right")) - 1
        return number, example - int(self._first[number])

    def _check_ids(self, example: int, tokens: np.ndarray) -> None:
        """Raise ValueError if an id is not in the vocabulary, which a model would read as another token."""
        if self._vocab_size is None or not tokens.size or tokens.max() < self._vocab_size:
            return
        raise ValueError(
            f"{self.path}: example {example} ({self.where(example)}) has the token id {tokens.max()}, but the tokenizer has only "
            f"{self._vocab_size} ids, so the set is damaged; {self._folder.remedy}"
        )

    def masks(self, pieces: Sequence[ExampleSlice]) -> list[np.ndarray | None]:
        """Return only the loss masks that `read` returns."""
        located = self._located(pieces)
        arrays = iter(self._folder.read([piece.part(piece.shard.mask) for piece in located if piece.shard.mask is not None]))
        return [None if piece.shard.mask is None else next(arrays) for piece in located]

    def _located(self, pieces: Sequence[ExampleSlice]) -> list[_LocatedPiece]:
        """Return the place of each piece in the arrays of its shard."""
        # side="right", since an example that is the first of its shard belongs to that shard, and empty shards are skipped.
        numbers = (np.searchsorted(self._first, [piece.example for piece in pieces], side="right") - 1).tolist()
        shards = [self._open(number) for number in numbers]
        segments = self.segments
        offset_parts = []
        for number, shard, piece in zip(numbers, shards, pieces, strict=True):
            index = int(piece.example - self._first[number])
            offset_parts.append(ArrayPart(shard.offsets, index, index + 1))
        located = []
        for shard, offset, piece in zip(shards, self._folder.read(offset_parts), pieces, strict=True):
            start = int(offset[0]) + piece.start
            # One id more than positions in each segment, since the last one is only a target.
            located.append(_LocatedPiece(shard, start, start + piece.length + int(segments[piece.example])))
        return located

    def first_with(self, token: int) -> int | None:
        """Return the first example that contains a token; None if there is none. All tokens are read."""
        for first, shard in zip(self._first[:-1].tolist(), self.manifest.shards, strict=True):
            tokens = self._folder.array(_file(shard, "tokens", self.manifest.dtype))
            for start in range(0, shard.tokens, _SEARCHED_AT_ONCE):
                places = np.flatnonzero(tokens[start : min(start + _SEARCHED_AT_ONCE, shard.tokens)] == token)
                if len(places):
                    [offsets] = self._folder.read_whole([_file(shard, "offsets", "int64")])
                    return int(first + np.searchsorted(offsets, start + places[0], side="right") - 1)
        return None

    def origin(self, example: int) -> Origin:
        """Return the location of an example's record in the source."""
        number = int(np.searchsorted(self._first, example, side="right")) - 1
        shard = self.manifest.shards[number]
        pairs = self._folder.array(_file(shard, "origins", "int64"))
        # `origins` holds pairs (span, line), flattened.
        index = 2 * (example - int(self._first[number]))
        span, line = (int(x) for x in pairs[index : index + 2])
        return Origin(shard.spans[span][0], line)

    def examples_of(self, records: Collection[Origin]) -> np.ndarray:
        """Return (n,) the examples that were made from records, in ascending order; a record may have given none or several."""
        chosen: list[int] = []
        for first, shard in zip(self._first[:-1].tolist(), self.manifest.shards, strict=True):
            # (examples, 2): span and line of each example of the shard.
            (flat,) = self._folder.read_whole([_file(shard, "origins", "int64")])
            for i, (span, line) in enumerate(flat.reshape(-1, 2).tolist()):
                if Origin(shard.spans[span][0], line) in records:
                    chosen.append(first + i)
        return np.array(chosen, np.int64)

    def place(self, origin: Origin) -> str:
        """Return the name of the file, or of another kind of place, that a record is from."""
        if self._source is None:
            return self.manifest.files[origin.place].path
        return self._source.names[origin.place]

    def where(self, example: int) -> str:
        """Return where an example's record comes from, for messages: `path:line`, or `path: row N`."""
        origin = self.origin(example)
        if self._source is not None:
            return self._source.where(origin)
        file = self.manifest.files[origin.place]
        return numbered(file.path, origin.number, file.by_line)


def _file(shard: ShardEntry, name: str, dtype: str) -> File:
    """Return a file of a shard."""
    return File(f"{shard.name}/{name}", dtype, shard.sizes[name])
