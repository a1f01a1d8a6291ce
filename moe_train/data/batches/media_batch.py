"""The batch type of texts with pictures or sound: packed sequences, with what the tower of the model takes for each row."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Self

import numpy as np

from moe_train import config
from moe_train.data.batches.batch import Batch, RowPlace, StoredPiece, write_segment
from moe_train.data.media import MediaRules


class _Arrays(NamedTuple):
    """Numpy arrays of shape (B, T), as in `Batch`, and (B, N, …) for the N patches or chunks that a row has room for."""

    tokens: np.ndarray
    """Input tokens."""
    targets: np.ndarray
    """The token that follows in the same segment."""
    loss_mask: np.ndarray
    """Whether the target is trained on."""
    segment_ids: np.ndarray
    """0 on padding; segments are numbered 1, 2, … along a row."""
    positions: np.ndarray
    """Position in the segment."""
    feature_index: np.ndarray
    """For a token that stands for a part of a picture or of sound, the index of its feature in the row; -1 for others (int32)."""
    units: np.ndarray
    """(B, N, …) float32: the normalized pixels of each patch, those that merge to one token being neighbours; or the log-mel
    spectrogram (frames, bands) of each chunk.
    """
    places: np.ndarray
    """(B, N, 2) int32: row and column of each patch in its picture; zeros for chunks."""
    ids: np.ndarray
    """(B, N) int32: pictures, or chunks, of the row, numbered from 1; 0 for padding."""


class MediaBatch(_Arrays):
    """Packed texts with pictures or sound; `media_batch` makes the type for a tower and the room of a row."""

    encoder: ClassVar[config.VisionEncoder | config.AudioEncoder]
    """The tower that takes the patches or the chunks."""
    units_per_row: ClassVar[int]
    """Patches or chunks that a row has room for."""
    rooms: ClassVar[tuple[int, ...]]
    """Rooms of the batches of a loader, ascending to its largest; (units_per_row,) for a single one."""

    @classmethod
    def with_room(cls, units: int) -> type[MediaBatch]:
        """Return the type for the smallest of the rooms that `units` patches or chunks fit into."""
        return media_batch(cls.encoder, next(room for room in cls.rooms if room >= units), cls.rooms)

    @classmethod
    def empty(cls, rows: int, seq_len: int) -> Self:
        """Return a batch of padding only."""
        N = cls.units_per_row
        return cls(
            *Batch.empty(rows, seq_len),
            np.full((rows, seq_len), -1, np.int32),
            np.zeros((rows, N, *cls.encoder.unit_shape), np.float32),
            np.zeros((rows, N, 2), np.int32),
            np.zeros((rows, N), np.int32),
        )

    @classmethod
    def synthetic(cls, rows: int, seq_len: int, vocab_size: int, seed: int) -> Self:
        """Return a batch of random tokens, whose first ones stand for random patches or chunks that fill the room."""
        batch = cls.empty(rows, seq_len)
        for array, random in zip(batch, Batch.synthetic(rows, seq_len, vocab_size, seed), strict=False):
            array[:] = random
        count = min(cls.encoder.num_features(cls.units_per_row), seq_len)
        batch.feature_index[:, :count] = np.arange(count)
        batch.loss_mask[:, : count - 1] = False
        batch.units[:] = np.random.default_rng(seed).normal(size=batch.units.shape)
        # One picture, since its patches attend to one another; chunks each attend to themselves.
        batch.ids[:] = 1 if isinstance(cls.encoder, config.VisionEncoder) else np.arange(1, cls.units_per_row + 1)
        return batch

    def fill_row(self, row: int, pieces: Sequence[StoredPiece]) -> None:
        """Write texts with their pictures or sound one after the other into an empty row."""
        place = RowPlace()
        num_units = 0
        last_id = 0
        for piece in pieces:
            start = place.position
            for segment in piece.segments():
                place = write_segment(self, row, place, segment)
            media = piece.media
            if media is None:
                continue
            end = num_units + len(media.units)
            self.units[row, num_units:end] = media.units
            self.places[row, num_units:end] = media.places
            self.ids[row, num_units:end] = last_id + media.ids
            # Pictures, or clips, and their tokens are in the same order.
            positions = start + np.flatnonzero(self.tokens[row, start : place.position] == media.token)
            features = np.arange(self.encoder.num_features(num_units), self.encoder.num_features(end))
            assert len(positions) == len(features), "pictures or sound and their tokens differ in number"
            self.feature_index[row, positions] = features
            num_units = end
            last_id = int(self.ids[row, end - 1])


def check_sizes(encoder: config.VisionEncoder | config.AudioEncoder, rules: MediaRules | None, name: object) -> None:
    """Raise ValueError if a tokenizer's rules for pictures or sound are not those of a tower.

    Args:
        encoder: the tower.
        rules: the rules; None if the tokenizer states none.
        name: the set, the tokenizer or the model, for the message.
    """
    if rules is None or rules.media != encoder.media:
        raise ValueError(
            f"{name}: its tokenizer states no sizes for {encoder.media}, which the model's tower takes; use the tekken.json that "
            "belongs to the model"
        )
    if rules.sizes != encoder.sizes:
        raise ValueError(
            f"{name}: its tokenizer has {encoder.media} of {_in_words(rules.sizes)}, but the tower of the model has "
            f"{_in_words(encoder.sizes)}; use the tokenizer that belongs to the model"
        )


def _in_words(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


@functools.cache
def media_batch(
    encoder: config.VisionEncoder | config.AudioEncoder, units_per_row: int, rooms: tuple[int, ...] = ()
) -> type[MediaBatch]:
    """Return the batch type for a tower.

    Args:
        encoder: the tower.
        units_per_row: patches or chunks that a row has room for.
        rooms: rooms among which a loader chooses for each batch, ascending; () for `units_per_row` alone.
    """
    rooms = rooms or (units_per_row,)
    sizes = {"encoder": encoder, "units_per_row": units_per_row, "rooms": rooms, "__module__": __name__}
    return type("MediaBatch", (MediaBatch,), sizes)
