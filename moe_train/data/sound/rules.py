"""The rules by which sound becomes tokens and spectrograms, which are those of mistral-common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class SoundRules:
    """Sizes and token ids for the sound of one model."""

    media: ClassVar[str] = "sound"
    """What becomes tokens, for messages."""

    sampling_rate: int
    """Samples a second that the model takes; other sound is resampled."""
    num_mel_bins: int
    """Frequency bands of the spectrogram."""
    hop_length: int
    """Samples between two frames of the spectrogram."""
    window_size: int
    """Samples of a frame's window."""
    frames_per_chunk: int
    """Frames of a chunk; a clip is padded with silence to whole chunks."""
    frames_per_token: int
    """Frames that become one token."""
    audio_token: int
    """Id of [AUDIO], which stands for the frames of a token."""
    begin_token: int
    """Id of [BEGIN_AUDIO], which begins a clip."""

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes that an audio tower has to share, for messages by what they are."""
        return {
            "frequency bands": self.num_mel_bins,
            "frames of a chunk": self.frames_per_chunk,
            "frames of a token": self.frames_per_token,
        }

    @property
    def samples_per_chunk(self) -> int:
        """Samples of a chunk."""
        return self.frames_per_chunk * self.hop_length

    @property
    def tokens_per_chunk(self) -> int:
        """Ids of [AUDIO] that stand for a chunk."""
        return self.frames_per_chunk // self.frames_per_token

    def num_chunks(self, samples: int) -> int:
        """Return the number of chunks of a clip, given its samples at `sampling_rate`."""
        return -(-samples // self.samples_per_chunk)

    def tokens(self, samples: int) -> list[int]:
        """Return the ids that stand for a clip, given its samples at `sampling_rate`."""
        return [self.begin_token, *[self.audio_token] * (self.num_chunks(samples) * self.tokens_per_chunk)]

    def room(self, tokens: Sequence[int]) -> int:
        """Return the number of chunks that some tokens stand for."""
        return tokens.count(self.audio_token) // self.tokens_per_chunk

    def sizes_in(self, tokens: Sequence[int]) -> list[int]:
        """Return the number of tokens of each clip among some tokens."""
        sizes: list[int] = []
        for token in tokens:
            if token == self.begin_token:
                sizes.append(1)
            elif token == self.audio_token:
                sizes[-1] += 1
        return sizes

    @property
    def control_ids(self) -> tuple[int, int]:
        """Ids of tokens that stand for sound, which are never trained on."""
        return self.audio_token, self.begin_token
