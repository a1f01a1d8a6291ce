"""Whisper's encoder in both layouts: real sizes, sinusoids, and params.json that describe no tower."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest

from moe_train.weights.wrappers import whisper
from tests.commands.wrapper import WHISPER_ARGS


def test_the_tensors_of_a_real_voxtral() -> None:
    """Voxtral Mini has 761 tensors in Mistral's own layout, 273 of which are its text model's."""
    rows = list(whisper.tensors(whisper.settings_of({}, 3072)))
    native = {row.native: row.shape for row in rows if row.native is not None}
    assert len(native) == 761 - 273 and [row.name for row in rows if row.native is None] == [whisper.POSITIONS]
    assert native["mm_whisper_embeddings.audio_language_projection.0.weight"] == (3072, 5120)
    assert native["mm_whisper_embeddings.whisper_encoder.conv_layers.1.weight"] == (1280, 1280, 3)
    assert "mm_whisper_embeddings.whisper_encoder.transformer.layers.31.attention.wk.bias" not in native


def test_positions_are_sinusoids() -> None:
    table = whisper.Positions(whisper.settings_of({"hidden_size": 8, "max_source_positions": 5}, 4)).read()
    for t in range(5):
        for i in range(4):
            angle = t / 10_000 ** (i / 3)
            assert np.allclose(table[t, [i, 4 + i]], [math.sin(angle), math.cos(angle)], atol=1e-6)


def native(change: Any = None, **more: Any) -> dict[str, Any]:
    params = {"multimodal": {"whisper_model_args": copy.deepcopy(WHISPER_ARGS)}, **more}
    if change is not None:
        change(params["multimodal"]["whisper_model_args"])
    return params


def test_both_layouts_state_the_same_sizes() -> None:
    of_config = whisper.settings_of({"d_model": 8, "encoder_layers": 1, "encoder_ffn_dim": 32, "encoder_attention_heads": 2}, 16)
    sizes = of_config.model_copy(update={"num_mel_bins": 4, "max_source_positions": 6})
    assert whisper.native_settings(native(), 16) == sizes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda args: args["encoder_args"].pop("dim"), r"encoder_args\.dim is not stated; add it"),
        (lambda args: args["encoder_args"].update(n_layers=-1), "num_hidden_layers is -1"),
        (lambda args: args["encoder_args"].update(dim=8.0), r"encoder_args\.dim is 8\.0; it has to be a whole number"),
        (lambda args: args["encoder_args"].update(causal=True), "the encoder of a realtime model"),
        (lambda args: args["downsample_args"].update(downsample_factor=None), "downsample_factor is not stated"),
        (lambda args: args["downsample_args"].update(downsample_factor=0), "projector_inputs is 0"),
        (lambda args: args.pop("downsample_args"), r"whisper_model_args\.downsample_args is None, but it has to be an object"),
        (lambda args: args["encoder_args"].update(audio_encoding_args=[]), r"audio_encoding_args is \[\], but"),
    ],
)
def test_a_params_json_that_describes_no_tower_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whisper.native_settings(native(change), 16)
