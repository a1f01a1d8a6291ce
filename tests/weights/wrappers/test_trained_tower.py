"""Trained tensors take the place of the base's, with adapters merged, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moe_train import config
from moe_train.weights import external
from moe_train.weights.wrappers.trained_tower import trained_names, with_trained
from tests.commands.wrapper import LAYER, TEXT, TOWER, save_wrapper
from tests.random_parameters import random_parameters
from tests.tiny import ONE

Q_PROJ = "vision.tower.layers.attention.q_proj"


def test_trained_tensors_replace_those_of_the_base(tmp_path: Path) -> None:
    lora = config.Lora(targets=(config.LoraTarget(modules=(Q_PROJ,), rank=2, alpha=3.0),))
    draw = np.random.default_rng(1).normal
    with jax.set_mesh(ONE):
        save_wrapper(tmp_path / "base", random_parameters(TEXT))
        carried = external.open_external_weights(tmp_path / "base").carried
        assert carried is not None
        weight, a, b = (jnp.asarray(draw(size=shape), jnp.float32) for shape in ((1, 8, 2, 4), (1, 8, 2), (1, 2, 2, 4)))
        linear = jnp.asarray(draw(size=(8, 16)), jnp.float32)
        parameters = {f"{Q_PROJ}.weight": weight, f"{Q_PROJ}.lora_a": a, f"{Q_PROJ}.lora_b": b}
        parameters |= {"vision.projector.in_proj.weight": linear, "embed.weight": linear}
        trained = with_trained(carried, TEXT, parameters, lora, jnp.dtype("bfloat16"))
        unchanged = with_trained(carried, TEXT, {"embed.weight": linear}, None, jnp.dtype("float32"))
    names = {f"{LAYER}attention.q_proj.weight", "multi_modal_projector.linear_1.weight"}
    assert set(trained_names(trained.tensors)) == names and unchanged is carried
    assert {name: tensor.shape for name, tensor in trained.tensors.items()} == TOWER
    merged = np.asarray(weight)[0].reshape(8, 8) + 1.5 * np.asarray(a)[0] @ np.asarray(b)[0].reshape(2, 8)
    found = trained.tensors[f"{LAYER}attention.q_proj.weight"].read()
    assert found.dtype == jnp.bfloat16 and np.array_equal(found, merged.T.astype(jnp.bfloat16))
    rows = trained.tensors["multi_modal_projector.linear_1.weight"].read((slice(2, 5),))
    assert np.array_equal(rows, np.asarray(linear).T[2:5].astype(jnp.bfloat16))
