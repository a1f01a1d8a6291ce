"""Audio: the tower and projector through which sound of records becomes inputs of the transformer."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from moe_train.config.section import Positive, Section
from moe_train.config.tower_features import ComputedFeatures, TowerFeatures

STRIDE = 2
"""Frames of a spectrogram for each position of the tower: the stride of its second convolution."""


class AudioEncoder(Section):
    """Whisper's encoder (arXiv:2212.04356) as in Voxtral (arXiv:2507.13264), and the projector to the width of the text model."""

    media: ClassVar[str] = "sound"
    """What the tower takes, for messages."""

    tower_dim: Positive
    """Width of the tower's hidden states (`hidden_size`)."""
    ffn_dim: Positive
    """Width of the hidden layer of the tower's feed-forward layers (`intermediate_size`)."""
    num_layers: Positive
    """Number of layers of the tower."""
    num_heads: Positive
    """Number of attention heads of the tower; each has tower_dim / num_heads dims."""
    num_mel_bins: Positive
    """Frequency bands of the spectrogram."""
    max_positions: Positive
    """Positions of a chunk of sound, each of two frames of the spectrogram (`max_source_positions`)."""
    downsampling: Positive
    """Positions that are concatenated to one token."""

    @property
    def frames_per_chunk(self) -> int:
        """Frames of the spectrogram of a chunk."""
        return STRIDE * self.max_positions

    @property
    def frames_per_token(self) -> int:
        """Frames of the spectrogram that become one token."""
        return STRIDE * self.downsampling

    @property
    def tokens_per_chunk(self) -> int:
        """Tokens that a chunk becomes."""
        return self.max_positions // self.downsampling

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Shape of a unit that a batch has room for: the spectrogram of a chunk."""
        return (self.frames_per_chunk, self.num_mel_bins)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes that a tokenizer has to share, for messages by what they are."""
        return {
            "frequency bands": self.num_mel_bins,
            "frames of a chunk": self.frames_per_chunk,
            "frames of a token": self.frames_per_token,
        }

    def num_features(self, chunks: int) -> int:
        """Return the number of tokens that stand for some chunks."""
        return chunks * self.tokens_per_chunk

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tower_dim % self.num_heads:
            raise ValueError(f"tower_dim {self.tower_dim} is not a multiple of num_heads {self.num_heads}; change either")
        if self.max_positions % self.downsampling:
            raise ValueError(
                f"max_positions {self.max_positions} is not a multiple of downsampling {self.downsampling}: a token would stand "
                "for parts of two chunks; change either"
            )
        return self


class Audio(Section):
    """Sound in the records of training. The tower of `init_from` and its projector are frozen unless patterns name their
    modules: in full training `audio.train`, with a `lora` section `lora.targets` and `lora.train`. Exports carry what is frozen.
    """

    chunks_per_row: Positive | None = None
    """Chunks of sound, of 30 s in Voxtral, that a row of a batch has room for. The tower computes as many for every row, so a
    smaller number saves time where rows have more text than sound; null: as many as fit into `train.seq_len` tokens.
    """
    buckets: Annotated[Positive, Field(le=8)] = 1
    """Sizes of that room: with 3, each step computes for all rows alike as many chunks as its fullest row needs, rounded up to the
    whole room, a half or a quarter of it. Each size that occurs is compiled once; set it where clips differ much in length.
    """
    train: tuple[str, ...] = ()
    """Patterns of the modules of tower and projector that full training trains with the text model, such as `audio.projector.*` or
    `audio.tower.*`; positions stay as they are. With a `lora` section, name them there: it freezes whatever it does not name.
    """
    features: TowerFeatures = ComputedFeatures()
    """Where the features of sound come from: computed in every step, or stored once, which only a frozen tower allows."""
    encoder: AudioEncoder | None = None
    """Sizes of the tower and the projector. Leave it out: `init_from` states them."""
