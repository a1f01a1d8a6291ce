"""The memory of a vision tower against the arrays that are really there."""

from __future__ import annotations

import math

import jax

from moe_train import config
from moe_train.machine.mesh import make_mesh
from moe_train.model.transformer import abstract_model
from moe_train.plan.memory import memory
from moe_train.plan.weights import layout
from tests.plan.test_memory import small


def test_a_vision_tower_counts() -> None:
    plain = small("mesh={fsdp: 2}", "train.batch_size=64")
    sizes = {"tower_dim": 32, "ffn_dim": 48, "num_layers": 2, "num_heads": 4, "patch_size": 2, "max_image_size": 8, "merge_size": 2}
    vision = config.RunVision(encoder=config.VisionEncoder(**sizes), patches_per_row=96)
    seeing = plain.model_copy(update={"vision": vision})
    before, after = (memory(run, layout(run)) for run in (plain, seeing))
    with jax.set_mesh(make_mesh(plain.mesh, jax.devices()[:2])):
        tower = abstract_model(plain.model, plain.compute, encoder=vision.encoder).vision
        shards = [math.prod(x.sharding.shard_shape(x.shape)) * 4 for x in jax.tree.leaves(tower)]
    assert after.parameters - before.parameters == sum(shards)
    # Pixels, places, picture and the index of a token's feature, on 32 rows of a device.
    assert after.batch - before.batch == 32 * (96 * (12 + 2 + 1) + 128) * 4
    assert after.optimizer == before.optimizer and after.gradients == before.gradients
    # A trained projector has moments, gradients and saved inputs; a trained tower the inputs of its layers too.
    projector = seeing.model_copy(update={"vision": vision.model_copy(update={"train": ("vision.projector.*",)})})
    everything = seeing.model_copy(update={"vision": vision.model_copy(update={"train": ("vision.*",)})})
    trained, whole = (memory(run, layout(run)) for run in (projector, everything))
    assert whole.gradients - before.gradients == sum(shards) > trained.gradients - before.gradients > 0
    assert whole.optimizer > trained.optimizer > before.optimizer
    patches = 32 * 96
    assert trained.saved - after.saved == (patches * 2 * 32 + patches // 4 * 2 * plain.model.model_dim) * 2  # bfloat16
    assert whole.saved - trained.saved == 3 * patches * 32 * 2
