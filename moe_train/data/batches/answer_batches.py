"""Batches of judged answers: preference pairs, and answers that are labelled as good or bad.

The answers of a row are numbered 1, 2, …: those of pair (or labelled answer) k are 2k - 1 and 2k. Every array is (B, T), so that
rows and positions are split over a mesh as tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, Self

import numpy as np

from moe_train.data.batches.batch import Batch, RowPlace, SegmentIds, StoredPiece, write_segment
from moe_train.data.chat.example import SEGMENT_START
from moe_train.data.prepared.reference_values import ReferenceValues

SHARED_POSITIONS = 1
"""Column of `TokenStore.values` for pairs with the positions that all segments share; see `data.chat.pairs_to_tokens`."""
SYNTHETIC_ANSWERS = 4
"""Number of answers in a row of a synthetic batch."""


class PreferenceBatch(NamedTuple):
    """Packed preference pairs; tokens to positions are as in `Batch`, and the rest is float32 and int32."""

    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    """Whether `targets[b, t]` belongs to an answer, and not to its prompt."""
    segment_ids: np.ndarray
    positions: np.ndarray
    answer_ids: np.ndarray
    """Number of the answer that a position belongs to, prompt included: 2k - 1 for chosen and 2k for rejected; 0 on padding."""
    reference: np.ndarray
    """Stored log-probability of each target under the reference model; NaN if none is stored."""
    reference_experts: np.ndarray
    """(B, T, L * A) uint8 or uint16: stored experts that the routers of the reference model choose at each position, layer by
    layer; (B, T, 0) if none are stored."""

    @classmethod
    def empty(cls, rows: int, seq_len: int) -> Self:
        """Return a batch of padding only."""
        return cls(*Batch.empty(rows, seq_len), np.zeros((rows, seq_len), np.int32), *_no_reference(rows, seq_len))

    @classmethod
    def synthetic(cls, rows: int, seq_len: int, vocab_size: int, seed: int) -> Self:
        """Return a batch of uniformly random tokens with two pairs per row, all of whose tokens belong to answers."""
        batch, answer_ids = _synthetic(rows, seq_len, vocab_size, seed)
        return cls(*batch, answer_ids, *_no_reference(rows, seq_len))

    def fill_row(self, row: int, pieces: Sequence[StoredPiece]) -> None:
        """Write pairs one after the other into an empty row."""
        place = RowPlace()
        for k, piece in enumerate(pieces):
            start = place.position
            for segment in piece.segments():
                behind = write_segment(self, row, place, segment)
                self.answer_ids[row, place.position : behind.position] = 2 * k + segment.answer
                place = behind
            _write_reference(self, row, slice(start, place.position), piece.reference)


class SharedPromptBatch(NamedTuple):
    """Packed preference pairs with one prompt for both answers; arrays as in `PreferenceBatch`.

    A pair has the segment of the prompt, and one for each answer, which begins with the last token of the prompt: the tokens that
    it predicts differ. Positions of an answer go on from the prompt's. `answer_ids` of the prompt are those of the chosen answer.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    answer_ids: np.ndarray
    reference: np.ndarray
    reference_experts: np.ndarray
    prompt_ids: np.ndarray
    """Segment id of the prompt that a position's segment continues (int32); its own segment id where it continues none."""

    @classmethod
    def empty(cls, rows: int, seq_len: int) -> Self:
        """Return a batch of padding only."""
        return cls(*PreferenceBatch.empty(rows, seq_len), np.zeros((rows, seq_len), np.int32))

    @classmethod
    def synthetic(cls, rows: int, seq_len: int, vocab_size: int, seed: int) -> Self:
        """Return a batch of uniformly random tokens with two pairs per row, whose prompts take half of it."""
        batch = cls.empty(rows, seq_len)
        ids = np.random.default_rng(seed).integers(0, vocab_size, (rows, seq_len // 2 + 1))
        first = seq_len // 2
        for row in range(rows):
            pieces = []
            for length in (first, seq_len - first):
                prompt = length // 2
                chosen = (length - prompt) // 2
                sizes = (prompt + 1 + chosen, prompt + 1 + length - prompt - chosen)
                pieces.append(_synthetic_pair(ids[row], sizes, prompt))
            batch.fill_row(row, pieces)
        return batch

    def fill_row(self, row: int, pieces: Sequence[StoredPiece]) -> None:
        """Write pairs one after the other into an empty row."""
        place = RowPlace()
        for k, piece in enumerate(pieces):
            assert piece.values is not None
            start = place.position
            num_shared = int(piece.values[SHARED_POSITIONS])
            prompt_id = place.segment
            if num_shared:
                first = next(piece.segments())
                # The next token is a target only: each answer begins with it.
                prompt = SegmentIds(first.tokens[: num_shared + 1], first.loss_mask[: num_shared + 1], 1)
                place = self._write(row, place, prompt, 2 * k + 1, prompt_id)
            for segment in piece.segments():
                answer = SegmentIds(segment.tokens[num_shared:], segment.loss_mask[num_shared:], segment.answer)
                continued = prompt_id if num_shared else place.segment
                place = self._write(row, place._replace(first_position=num_shared), answer, 2 * k + segment.answer, continued)
            _write_reference(self, row, slice(start, place.position), piece.reference)

    def _write(self, row: int, place: RowPlace, segment: SegmentIds, answer_id: int, prompt_id: int) -> RowPlace:
        """Write a segment, and return the place behind it."""
        behind = write_segment(self, row, place, segment)
        self.answer_ids[row, place.position : behind.position] = answer_id
        self.prompt_ids[row, place.position : behind.position] = prompt_id
        return behind


class UnpairedBatch(NamedTuple):
    """Packed labelled answers, each followed by its prompt with the answer of another record; arrays as in `PreferenceBatch`.

    Answer 2k - 1 is the labelled one, and 2k the mismatched one. In `segment_ids` the mismatched segments are padding, since they
    are not trained on.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    answer_ids: np.ndarray
    reference: np.ndarray
    reference_experts: np.ndarray
    mismatched_ids: np.ndarray
    """Segment ids of the mismatched segments alone; the labelled ones are padding here."""
    good: np.ndarray
    """Whether the labelled answer that a position belongs to is good (bool)."""

    @classmethod
    def empty(cls, rows: int, seq_len: int) -> Self:
        """Return a batch of padding only."""
        more = (np.zeros((rows, seq_len), np.int32), np.zeros((rows, seq_len), bool))
        return cls(*PreferenceBatch.empty(rows, seq_len), *more)

    @classmethod
    def synthetic(cls, rows: int, seq_len: int, vocab_size: int, seed: int) -> Self:
        """Return a batch of uniformly random tokens with two labelled answers per row, one of them good."""
        batch, answer_ids = _synthetic(rows, seq_len, vocab_size, seed)
        is_mismatched = answer_ids % 2 == 0
        mismatched_ids = np.where(is_mismatched, batch.segment_ids, 0)
        batch = batch._replace(segment_ids=np.where(is_mismatched, 0, batch.segment_ids))
        return cls(*batch, answer_ids, *_no_reference(rows, seq_len), mismatched_ids, answer_ids == 1)

    def fill_row(self, row: int, pieces: Sequence[StoredPiece]) -> None:
        """Write labelled answers, each with its mismatched one, one after the other into an empty row."""
        place = RowPlace()
        for k, piece in enumerate(pieces):
            assert piece.values is not None and piece.mismatched is not None
            start = place.position
            for segment in piece.segments():
                behind = write_segment(self, row, place, segment)
                self.answer_ids[row, place.position : behind.position] = 2 * k + 1
                self.good[row, place.position : behind.position] = piece.values[0] == 1
                place = behind
            behind = write_segment(self, row, place, mismatched_segment(piece, piece.mismatched))
            mismatched = slice(place.position, behind.position)
            self.answer_ids[row, mismatched] = 2 * k + 2
            self.mismatched_ids[row, mismatched] = place.segment
            self.segment_ids[row, mismatched] = 0
            place = behind
            _write_reference(self, row, slice(start, place.position), piece.reference)


def _no_reference(rows: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the arrays of stored log-probabilities and experts where nothing is stored."""
    return np.zeros((rows, seq_len), np.float32), np.zeros((rows, seq_len, 0), np.uint8)


class _ReferenceArrays(Protocol):
    """The arrays of a batch that hold what a reference model makes of it."""

    @property
    def reference(self) -> np.ndarray: ...
    @property
    def reference_experts(self) -> np.ndarray: ...


def _write_reference(batch: _ReferenceArrays, row: int, positions: slice, stored: ReferenceValues | None) -> None:
    """Write what is stored of the reference model for an example into its positions of a row."""
    batch.reference[row, positions] = np.nan if stored is None else stored.logprobs
    if stored is not None and stored.expert_ids is not None:
        batch.reference_experts[row, positions] = stored.expert_ids


def mismatched_segment(piece: StoredPiece, mismatched: StoredPiece) -> SegmentIds:
    """Return the prompt of a labelled answer followed by the answer of another record, which alone is in the loss mask."""
    own = next(piece.segments())
    another = next(mismatched.segments())
    prompt = own.tokens[: int(np.argmax(own.loss_mask))]
    answer_start = int(np.argmax(another.loss_mask))
    tokens = np.concatenate([prompt, another.tokens[answer_start:]])
    mask = np.concatenate([np.zeros(len(prompt), bool), another.loss_mask[answer_start:]])
    return SegmentIds(tokens, mask, 2)


def _synthetic_pair(ids: np.ndarray, sizes: tuple[int, int], num_shared: int) -> StoredPiece:
    """Return a pair whose answers have the given numbers of tokens, of which all but the first `num_shared + 1` are trained on."""
    tokens = np.concatenate([ids[: sizes[0]], ids[: sizes[1]]])
    places = np.concatenate([np.arange(size) for size in sizes])
    answers = np.repeat([1, 2], sizes) + SEGMENT_START * (places == 0)
    return StoredPiece(tokens, places > num_shared, answers, np.array([np.nan, num_shared]))


def _synthetic(rows: int, seq_len: int, vocab_size: int, seed: int) -> tuple[Batch, np.ndarray]:
    """Return random tokens in segments of nearly equal size, and the answer that each segment is."""
    batch = Batch.synthetic(rows, seq_len, vocab_size, seed)
    segments = np.arange(seq_len, dtype=np.int32) * SYNTHETIC_ANSWERS // seq_len + 1
    starts = np.searchsorted(segments, segments)
    positions = (np.arange(seq_len) - starts).astype(np.int32)
    answer_ids = np.broadcast_to(segments, (rows, seq_len)).copy()
    return batch._replace(segment_ids=answer_ids.copy(), positions=np.broadcast_to(positions, (rows, seq_len)).copy()), answer_ids
