"""Features of a probe picture and of probe sound tell whether the tower in the files is the one that was trained."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from moe_train import config
from moe_train.config import Mesh
from moe_train.machine.mesh import make_mesh
from moe_train.proof import probe_media
from moe_train.proof.carried import CarriedFrom
from moe_train.proof.checks import Fault
from moe_train.weights import external
from tests.commands.audio_wrapper import MODEL, save_audio_wrapper
from tests.commands.wrapper import TEXT, save_wrapper
from tests.random_parameters import random_parameters
from tests.tiny import ONE

CASES = {
    "pictures": (TEXT, config.VisionEncoder, "vision.projector.in_proj.weight", 6),
    "sound": (MODEL, config.AudioEncoder, "audio.projector.in_proj.weight", 4),
}
"""Text model, kind of tower, a weight of it, and tokens of the probe."""


@pytest.mark.parametrize("media", CASES)
def test_features_do_not_depend_on_the_mesh_and_show_any_change(media: str, tmp_path: Path) -> None:
    model, section, path, tokens = CASES[media]
    base = tmp_path / "base"
    with jax.set_mesh(ONE):
        save = save_wrapper if media == "pictures" else save_audio_wrapper
        save(base, random_parameters(model))
    tower = probe_media.Tower(external.read_encoder(base, section), model)
    assert probe_media.encoder_in_files(base) == tower.encoder
    origin = CarriedFrom(base, "hf")
    with jax.set_mesh(ONE):
        finding, features = probe_media.check_features(base, origin, tower, {}, "float32", 1e-6)
        assert finding.metrics["features"] == 0 and features.shape == (tokens, model.model_dim)
        assert np.ptp(features, axis=0).min() > 0
        weights = external.load_external_parameters(base, tower.shapes()[1])
    with jax.set_mesh(make_mesh(Mesh(data=2, context=2, tensor=2))):
        _, of_mesh = probe_media.check_features(base, origin, tower, {}, "float32", 1e-5)
    assert np.abs(of_mesh - features).max() < 1e-5 * np.abs(features).max()
    tensors = safetensors.numpy.load_file(base / "model.safetensors")
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "config.json").write_text((base / "config.json").read_text())
    tensors["multi_modal_projector.linear_1.weight"] *= 1.01
    safetensors.numpy.save_file(tensors, changed / "model.safetensors")
    with jax.set_mesh(ONE):
        with pytest.raises(Fault, match=r"features of (a probe picture|probe sound) are off by 0\.0"):
            probe_media.check_features(changed, origin, tower, {}, "float32", 1e-4)
        probe_media.check_features(changed, origin, tower, {path: weights[path] * np.float32(1.01)}, "float32", 1e-4)
        stored = features[:, : probe_media.STORED_NUMBERS].tolist()
        probe_media.check_features_again(base, tower, stored, 1e-5)
        with pytest.raises(Fault):
            probe_media.check_features_again(changed, tower, stored, 1e-5)
