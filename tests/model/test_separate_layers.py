"""A model with separate layers computes what the stacked one computes."""

from __future__ import annotations

import jax
import numpy as np

from moe_train import config
from moe_train.machine.mesh import use_default_mesh
from moe_train.model.separate_layers import separate_layers
from moe_train.model.transformer import init_model
from tests.evaluate.tiny_generator import ATTENTION, SIZES

MODEL = config.Model(
    family="ministral",
    attention=ATTENTION.model_copy(update={"windows": (None, 7)}),
    ffn=config.DenseFfn(name="dense", ffn_dim=16),
    **SIZES | {"num_layers": 4},
)


def test_layers_keep_their_order_and_stacked_arrays_can_be_released() -> None:
    use_default_mesh()
    transformer = jax.jit(lambda: init_model(0, MODEL))()
    separated = separate_layers(transformer)
    assert len(transformer.stacks) == 1  # the given model is as before
    for repeat, stack in enumerate(separated.stacks):
        for one, stacked in zip(jax.tree.leaves(stack), jax.tree.leaves(transformer.stacks[0]), strict=True):
            np.testing.assert_array_equal(one, stacked[repeat : repeat + 1])
    released = separate_layers(transformer, release=True)
    np.testing.assert_array_equal(jax.tree.leaves(released)[3], jax.tree.leaves(separated)[3])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(transformer.stacks))
