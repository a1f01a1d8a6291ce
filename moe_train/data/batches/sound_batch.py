"""The batch type of texts with sound: packed sequences, with the spectrograms of the sound of each row."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Self

import numpy as np

from moe_train import config
from moe_train.data.batches.batch import Batch, RowPlace, StoredPiece, write_segment
from moe_train.data.sound.clips import SoundOfPiece
from moe_train.data.sound.rules import SoundRules


class _Arrays(NamedTuple):
    """Numpy arrays of shape (B, T), as in `Batch`, and (B, C, …) for the C chunks that a row has room for."""

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
    """For a token that stands for a part of a chunk, the index of that part in the row; -1 for others (int32)."""
    frames: np.ndarray
    """(B, C, F, M) float32: log-mel spectrogram of each chunk."""
    chunk_ids: np.ndarray
    """(B, C) int32: chunks of the row, numbered from 1; 0 for padding."""


class SoundBatch(_Arrays):
    """Packed texts with sound; `sound_batch` makes the type for a tower and a number of chunks."""

    encoder: ClassVar[config.AudioEncoder]
    """The tower that takes the spectrograms."""
    chunks_per_row: ClassVar[int]
    """Chunks that a row has room for."""

    @classmethod
    def empty(cls, rows: int, seq_len: int) -> Self:
        """Return a batch of padding only."""
        C = cls.chunks_per_row
        return cls(
            *Batch.empty(rows, seq_len),
            np.full((rows, seq_len), -1, np.int32),
            np.zeros((rows, C, cls.encoder.frames_per_chunk, cls.encoder.num_mel_bins), np.float32),
            np.zeros((rows, C), np.int32),
        )

    @classmethod
    def synthetic(cls, rows: int, seq_len: int, vocab_size: int, seed: int) -> Self:
        """Return a batch of random tokens, whose first ones stand for random sound that fills the room."""
        batch = cls.empty(rows, seq_len)
        for array, random in zip(batch, Batch.synthetic(rows, seq_len, vocab_size, seed), strict=False):
            array[:] = random
        count = min(cls.chunks_per_row * cls.encoder.tokens_per_chunk, seq_len)
        batch.feature_index[:, :count] = np.arange(count)
        batch.loss_mask[:, : count - 1] = False
        batch.frames[:] = np.random.default_rng(seed).normal(size=batch.frames.shape)
        batch.chunk_ids[:] = np.arange(1, cls.chunks_per_row + 1)
        return batch

    @classmethod
    def check_rules(cls, rules: SoundRules, name: str) -> None:
        """Raise ValueError if sound becomes tokens by other sizes than those of the tower.

        Args:
            rules: how the sound of a set became tokens.
            name: the set, for the message.
        """
        check_sizes(cls.encoder, rules, name)

    def fill_row(self, row: int, pieces: Sequence[StoredPiece]) -> None:
        """Write texts with their sound one after the other into an empty row."""
        place = RowPlace()
        num_chunks = 0
        for piece in pieces:
            start = place.position
            for segment in piece.segments():
                place = write_segment(self, row, place, segment)
            sound = piece.pictures
            if sound is None:
                continue
            assert isinstance(sound, SoundOfPiece)  # `check_set` has refused pictures
            end = num_chunks + len(sound.chunks)
            self.frames[row, num_chunks:end] = sound.chunks
            self.chunk_ids[row, num_chunks:end] = np.arange(num_chunks, end) + 1
            # Chunks and their tokens are in the same order.
            positions = start + np.flatnonzero(self.tokens[row, start : place.position] == sound.audio_token)
            features = np.arange(num_chunks * self.encoder.tokens_per_chunk, end * self.encoder.tokens_per_chunk)
            assert len(positions) == len(features), "sound and its tokens differ in number"
            self.feature_index[row, positions] = features
            num_chunks = end


def check_sizes(encoder: config.AudioEncoder, rules: SoundRules | None, name: object) -> None:
    """Raise ValueError if a tokenizer's rules for sound are not those of a tower.

    Args:
        encoder: the tower.
        rules: the rules; None if the tokenizer states none.
        name: the set or the model, for the message.
    """
    expected = (encoder.num_mel_bins, encoder.frames_per_chunk, encoder.frames_per_token)
    stated = None if rules is None else (rules.num_mel_bins, rules.frames_per_chunk, rules.frames_per_token)
    if stated != expected:
        raise ValueError(
            f"{name}: its tokenizer has sound of frequency bands, frames of a chunk and frames of a token {stated}, but the audio "
            f"tower has {expected}; use the tokenizer that belongs to the model"
        )


@functools.cache
def sound_batch(encoder: config.AudioEncoder, chunks_per_row: int) -> type[SoundBatch]:
    """Return the batch type for the chunks of a tower.

    Args:
        encoder: the tower.
        chunks_per_row: chunks that a row has room for.
    """
    sizes = {"encoder": encoder, "chunks_per_row": chunks_per_row, "__module__": __name__}
    return type("SoundBatch", (SoundBatch,), sizes)
