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
    transformer = init_model(0, MODEL)
    tokens = np.arange(12).reshape(1, 12)
    expected, _ = transformer(tokens)
    separated = separate_layers(transformer)
    assert [stack.repeats for stack in separated.stacks] == [1, 1]
    assert len(transformer.stacks) == 1  # the given model is as before
    np.testing.assert_allclose(separated(tokens)[0], expected, rtol=1e-5)
    again = separate_layers(transformer, release=True)
    np.testing.assert_array_equal(again(tokens)[0], separated(tokens)[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(transformer.stacks))
