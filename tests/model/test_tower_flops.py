"""FLOPs of towers: counted from the weights that patches, positions and tokens meet."""

from __future__ import annotations

import jax
import pytest

from moe_train import config
from moe_train.model import tower_flops as flops
from moe_train.model.parameters import parameters
from moe_train.model.transformer import abstract_model
from tests.model.test_flops import S
from tests.tiny import ONE


def test_flops_of_a_vision_tower() -> None:
    """Two per weight that a patch or the token of a square meets, and four per dim and pair of patches of a picture."""
    sizes = {"tower_dim": 16, "ffn_dim": 12, "num_layers": 2, "num_heads": 2, "patch_size": 2, "max_image_size": 8, "merge_size": 2}
    encoder = config.VisionEncoder(**sizes)
    with jax.set_mesh(ONE):
        shapes = parameters(abstract_model(S, encoder=encoder))[1]
    matrices = {path: x.size for path, x in shapes.items() if path.startswith("vision.") and not path.endswith("scale")}
    of_tower = sum(size for path, size in matrices.items() if path.startswith("vision.tower."))
    of_projector = sum(matrices.values()) - of_tower
    expected = 2 * (64 * of_tower + 64 / 4 * of_projector) + 2 * 4 * 16 * 64 * 16
    assert flops.tower_flops(encoder, S.model_dim, 64) == pytest.approx(expected, rel=1e-12)
    # Everything in full takes three times as much, the gradient of the pixels included; a projector in full, three times its own.
    everything = flops.TrainedModules(None, ("vision.*",))
    assert flops.tower_flops(encoder, S.model_dim, 64, everything) == pytest.approx(3 * expected, rel=1e-12)
    projector = flops.TrainedModules(config.Lora(train=("vision.projector.*",)))
    more = flops.tower_flops(encoder, S.model_dim, 64, projector) - expected
    assert more == pytest.approx(2 * 2 * 64 / 4 * of_projector, rel=1e-12)
    target = config.LoraTarget(modules=("vision.projector.out_proj",), rank=4, alpha=8.0)
    adapted = flops.tower_flops(encoder, S.model_dim, 64, flops.TrainedModules(config.Lora(targets=(target,)))) - expected
    assert adapted == pytest.approx(16 * (2 * S.model_dim**2 + 6 * 4 * 2 * S.model_dim), rel=1e-12)


def test_flops_of_an_audio_tower() -> None:
    """Convolutions meet frames and positions, layers positions, the projector tokens; a position sees those of its chunk."""
    sizes = {"tower_dim": 16, "ffn_dim": 24, "num_layers": 2, "num_heads": 2, "num_mel_bins": 8, "max_positions": 12}
    encoder = config.AudioEncoder(**sizes, downsampling=4)
    with jax.set_mesh(ONE):
        shapes = parameters(abstract_model(S, encoder=encoder))[1]
    weights = {path.removeprefix("audio."): x.size for path, x in shapes.items() if path.startswith("audio.")}
    weights = {path: size for path, size in weights.items() if path.endswith("weight")}
    times = {"tower.first_conv": 24, "tower.second_conv": 12, "tower.layers": 12, "projector": 3}
    products = sum(count * size for path, size in weights.items() for part, count in times.items() if path.startswith(part))
    expected = 5 * (2 * products + 2 * 4 * 16 * 12 * 12)
    assert flops.tower_flops(encoder, S.model_dim, 5) == pytest.approx(expected, rel=1e-12)
    everything = flops.TrainedModules(None, ("audio.*",))
    assert flops.tower_flops(encoder, S.model_dim, 5, everything) == pytest.approx(3 * expected, rel=1e-12)
