"""The sizes of an audio tower, and what the section on sound needs of others."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from moe_train import config
from moe_train.config.checks import check_audio, check_audio_section
from tests.commands.audio_wrapper import ENCODER


class Sections:
    """Stands for a config of which only the mesh is read."""

    def __init__(self, **sizes: int) -> None:
        self.mesh = config.Mesh(**sizes)


def test_sizes_of_chunks_and_tokens() -> None:
    sizes = (ENCODER.frames_per_chunk, ENCODER.frames_per_token, ENCODER.tokens_per_chunk)
    assert sizes == (32, 8, 4)
    stated = ENCODER.model_dump()
    with pytest.raises(ValidationError, match="tower_dim 15 is not a multiple of num_heads 2"):
        config.AudioEncoder(**stated | {"tower_dim": 15})
    with pytest.raises(ValidationError, match="max_positions 18 is not a multiple of downsampling 4"):
        config.AudioEncoder(**stated | {"max_positions": 18})


def test_a_tower_has_to_fit_the_mesh() -> None:
    sections = Sections(context=2, tensor=2)
    check_audio(sections, ENCODER, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"chunks_per_row 3 is not a multiple of mesh.context 2.*use 4"):
        check_audio(sections, ENCODER, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_heads of the audio tower"):
        check_audio(Sections(tensor=4), ENCODER, 4)  # type: ignore[arg-type]


def test_only_next_tokens_are_learned_from_sound() -> None:
    check_audio_section(config.NextToken(name="next_token"), has_base=True, has_vision=False)
    with pytest.raises(ValueError, match="audio has no effect on objective preference"):
        check_audio_section(config.Preference(name="preference"), has_base=True, has_vision=False)
