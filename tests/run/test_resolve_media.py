"""The sections `vision` and `audio` with what the base says."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from moe_train import config
from moe_train.run.resolve_media import audio_with_encoder, vision_with_encoder
from tests.commands.audio_wrapper import ENCODER, MODEL, save_audio_wrapper
from tests.commands.wrapper import TEXT, save_wrapper
from tests.random_parameters import random_parameters
from tests.tiny import ONE


class Written:
    """Stands for a config of which only two keys are read."""

    def __init__(self, init_from: Path, seq_len: int) -> None:
        self.init_from = str(init_from)
        self.train = config.Train(steps=1, batch_size=1, seq_len=seq_len)


def resolved(audio: config.Audio, init_from: Path, seq_len: int = 40, context: int = 1) -> config.Audio:
    return audio_with_encoder(audio, Written(init_from, seq_len), context)  # type: ignore[arg-type]


def test_sizes_and_room(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        save_audio_wrapper(tmp_path / "base", random_parameters(MODEL))
    audio = config.Audio()
    assert resolved(audio, tmp_path / "base") == config.Audio(encoder=ENCODER, chunks_per_row=10)
    assert resolved(audio, tmp_path / "base", context=4).chunks_per_row == 12
    assert resolved(config.Audio(chunks_per_row=3), tmp_path / "base").chunks_per_row == 3
    with pytest.raises(ValueError, match="seq_len 3 is less than the 4 tokens of a chunk"):
        resolved(audio, tmp_path / "base", seq_len=3)
    larger = ENCODER.model_copy(update={"num_layers": 2})
    with pytest.raises(ValueError, match=r"audio.encoder is not that of"):
        resolved(config.Audio(encoder=larger), tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="no such files of a model with a tower for sound"):
        resolved(audio, tmp_path / "nowhere")
    assert resolved(config.Audio(encoder=larger), tmp_path / "nowhere").encoder == larger


def test_sizes_and_room_for_pictures(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        save_wrapper(tmp_path / "base", random_parameters(TEXT))
    written: config.Config = Written(tmp_path / "base", 40)  # type: ignore[assignment]
    vision = vision_with_encoder(config.Vision(), written)
    assert vision.encoder is not None and vision.patches_per_row == 40 * vision.encoder.patches_per_token
    assert vision_with_encoder(config.Vision(patches_per_row=8), written).patches_per_row == 8
    larger = vision.encoder.model_copy(update={"num_layers": 2})
    with pytest.raises(ValueError, match=r"vision.encoder is not that of"):
        vision_with_encoder(config.Vision(encoder=larger), written)
    with pytest.raises(ValueError, match="sound needs an audio tower"):
        resolved(config.Audio(), tmp_path / "base")
