"""Sound as arrays: the spectrograms of all chunks of a row, and the tokens that their features stand for."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int

from moe_train.model.sharding.specs import place


class Sound(NamedTuple):
    """The sound of a batch; C and T are split over `context`, B like the batch.

    Chunks are in the order in which they stand in the row.
    """

    frames_BCFM: Float[Array, "B C F M"]
    """Log-mel spectrogram of each chunk: frames, frequency bands."""
    chunk_ids_BC: Int[Array, "B C"]
    """Chunks of a row, numbered from 1; 0 for padding."""
    feature_index_BT: Int[Array, "B T"]
    """For a token that stands for a part of a chunk, the index of its feature in the row; -1 for all other tokens."""

    def placed(self) -> Sound:
        """Return the arrays with the shardings of activations."""
        # Chunks stand where a text model has its tokens.
        return Sound(place(self.frames_BCFM, "BTCM"), place(self.chunk_ids_BC, "BT"), place(self.feature_index_BT, "BT"))
