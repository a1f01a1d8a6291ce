"""Features of a probe picture tell whether the tower in the files is the one that was trained."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from moe_train import config
from moe_train.config import Mesh
from moe_train.machine.mesh import make_mesh
from moe_train.proof import pictures
from moe_train.proof.carried import CarriedFrom
from moe_train.proof.checks import Fault
from moe_train.weights import external
from tests.commands.wrapper import TEXT, save_wrapper
from tests.random_parameters import random_parameters
from tests.tiny import ONE


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("probe") / "base"
    with jax.set_mesh(ONE):
        save_wrapper(directory, random_parameters(TEXT))
    return directory


def test_features_do_not_depend_on_the_mesh_and_show_any_change(base: Path, tmp_path: Path) -> None:
    tower = pictures.Tower(external.read_encoder(base, config.VisionEncoder), TEXT)
    origin = CarriedFrom(base, "hf")
    with jax.set_mesh(ONE):
        finding, features = pictures.check_pictures(base, origin, tower, {}, "float32", 1e-6)
        assert finding.metrics["features"] == 0 and features.shape == (6, TEXT.model_dim) and np.ptp(features, axis=0).min() > 0
        weights = external.load_external_parameters(base, tower.shapes()[1])
    with jax.set_mesh(make_mesh(Mesh(data=2, context=2, tensor=2))):
        _, of_mesh = pictures.check_pictures(base, origin, tower, {}, "float32", 1e-6)
    assert np.abs(of_mesh - features).max() < 1e-5 * np.abs(features).max()
    tensors = safetensors.numpy.load_file(base / "model.safetensors")
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "config.json").write_text((base / "config.json").read_text())
    tensors["multi_modal_projector.linear_1.weight"] *= 1.01
    safetensors.numpy.save_file(tensors, changed / "model.safetensors")
    path = "vision.projector.in_proj.weight"
    with jax.set_mesh(ONE):
        with pytest.raises(Fault, match=r"features of the probe picture are off by 0\.0"):
            pictures.check_pictures(changed, origin, tower, {}, "float32", 1e-4)
        pictures.check_pictures(changed, origin, tower, {path: weights[path] * np.float32(1.01)}, "float32", 1e-4)
        stored = features[:, : pictures.STORED_NUMBERS].tolist()
        pictures.check_features_again(base, tower, stored, 1e-5)
        with pytest.raises(Fault):
            pictures.check_features_again(changed, tower, stored, 1e-5)
