"""Towers of files as weights of our model: the kind that is needed, unquantized, and computed as the files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from moe_train import config
from moe_train.weights import external
from tests.commands.audio_wrapper import MODEL, save_audio_wrapper
from tests.commands.wrapper import TEXT, save_wrapper
from tests.random_parameters import random_parameters
from tests.tiny import ONE


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that sees, one that hears, and one with a quantized tower."""
    folder = tmp_path_factory.mktemp("towers")
    with jax.set_mesh(ONE):
        save_wrapper(folder / "seeing", random_parameters(TEXT))
        save_audio_wrapper(folder / "hearing", random_parameters(MODEL))
        name = "vision_tower.transformer.layers.0.attention.q_proj.weight"
        quantized = {name: np.zeros((8, 8), ml_dtypes.float8_e4m3fn), f"{name}_scale_inv": np.ones((), np.float32)}
        save_wrapper(folder / "fp8", random_parameters(TEXT), tower=quantized)
    return folder


def test_a_tower_of_the_other_kind_or_quantized_is_refused(towers: Path) -> None:
    with pytest.raises(ValueError, match=r"has the vision tower and projector, but sound needs an audio tower"):
        external.read_encoder(towers / "seeing", config.AudioEncoder)
    with pytest.raises(ValueError, match=r"has the audio tower and projector, but pictures need a vision tower"):
        external.read_encoder(towers / "hearing", config.VisionEncoder)
    with pytest.raises(ValueError, match=r"quantized vision tower .*float8"):
        external.read_encoder(towers / "fp8", config.VisionEncoder)
    assert external.find_encoder(towers / "fp8") is None
    assert isinstance(external.find_encoder(towers / "seeing"), config.VisionEncoder)
    assert isinstance(external.find_encoder(towers / "hearing"), config.AudioEncoder)


@pytest.mark.parametrize(
    ("model", "section", "changes", "reason"),
    [
        ("seeing", None, {"vision_feature_layer": -2}, r"vision_feature_layer is -2.*tower with -1"),
        (
            "seeing",
            None,
            {"projector_hidden_act": "relu"},
            r"projector_hidden_act is 'relu', and pictures need",
        ),
        ("seeing", "vision_config", {"hidden_act": "relu"}, "activation Input should be 'silu' or 'gelu'"),
        ("hearing", None, {"projector_hidden_act": "relu"}, r"projector_hidden_act is 'relu', and sound needs"),
        ("hearing", "audio_config", {"scale_embedding": True}, r"scale_embedding is True, and sound needs a tower with False"),
    ],
)
def test_towers_that_are_not_computed(
    towers: Path, tmp_path: Path, model: str, section: str | None, changes: dict[str, Any], reason: str
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in (towers / model).iterdir():
        (base / file.name).hardlink_to(file)
    fields = json.loads((base / "config.json").read_text())
    (fields if section is None else fields[section]).update(changes)
    (base / "config.json").unlink()
    (base / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=reason):
        external.find_encoder(base)
