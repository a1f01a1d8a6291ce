"""Settings of an audio tower in both layouts; conversions are tested in test_carry.py, and in transformers by the judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_train.weights.wrappers import whisper, whisper_settings
from tests.commands.wrapper import TEXT, WHISPER_ARGS

PARAMS = {"multimodal": {"whisper_model_args": WHISPER_ARGS}}
SIZES = whisper.native_settings(PARAMS, TEXT.model_dim)


def no_token(name: str) -> None:
    return None


def test_settings_go_into_the_other_layout_and_back(tmp_path: Path) -> None:
    fields = whisper_settings.to_hugging_face(PARAMS, SIZES, TEXT, {"[AUDIO]": 9}.get)
    assert fields["audio_token_id"] == 9 and whisper.settings_of(fields["audio_config"], TEXT.model_dim) == SIZES
    (name, extractor) = next(iter(whisper_settings.processor_files(PARAMS, SIZES).items()))
    (tmp_path / name).write_text(json.dumps({**extractor, "n_fft": 512}))
    section = whisper_settings.to_native(fields, SIZES, tmp_path, {"[AUDIO]": 9}.get)
    mel = section["whisper_model_args"]["encoder_args"].pop("audio_encoding_args")
    assert mel == {**WHISPER_ARGS["encoder_args"]["audio_encoding_args"], "window_size": 512}
    with pytest.raises(ValueError, match=r"audio_token_id is 9 in its config\.json.*24"):
        whisper_settings.to_native(fields, SIZES, tmp_path, no_token)


@pytest.mark.parametrize(
    ("args", "model", "message"),
    [
        ({"downsample_args": {"downsample_factor": 2}}, TEXT, "its projector takes 16 numbers.*, 32"),
        ({"encoder_args": {**WHISPER_ARGS["encoder_args"], "head_dim": 2}}, TEXT, "2 heads of 2 dims"),
        (
            {"encoder_args": {**WHISPER_ARGS["encoder_args"], "pos_embed": "rope"}},
            TEXT,
            "pos_embed is 'rope' .* only has 'sinusoidal'",
        ),
        ({}, TEXT.model_copy(update={"family": "ministral"}), "has no text model of family ministral"),
    ],
)
def test_what_transformers_cannot_compute_is_refused(args: Any, model: Any, message: str) -> None:
    params = {"multimodal": {"whisper_model_args": WHISPER_ARGS | args}}
    with pytest.raises(ValueError, match=message):
        whisper_settings.to_hugging_face(params, whisper.native_settings(params, TEXT.model_dim), model, no_token)
