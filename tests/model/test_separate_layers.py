"""A model with separate layers computes what the stacked one computes."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.machine.mesh import BATCH, put_equal, use_default_mesh
from moe_train.model import separate_layers as separate_layers_module
from moe_train.model.separate_layers import separate_layers
from moe_train.model.transformer import empty_caches, init_model
from tests.evaluate.tiny_generator import ATTENTION, MIXTRAL, SIZES

MODEL = config.Model(
    family="ministral",
    attention=ATTENTION.model_copy(update={"windows": (None, 7)}),
    ffn=config.DenseFfn(name="dense", ffn_dim=16),
    **SIZES | {"num_layers": 4},
)


def test_separate_experts_compute_what_stacked_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with adapters, whose scales differ, for few rows and for many, with experts that have none."""
    monkeypatch.setattr(separate_layers_module, "MIN_EXPERT_BYTES", 0)
    use_default_mesh()
    lora = config.Lora(targets=(config.LoraTarget(modules=("ffn.*_proj",), rank=2, alpha=3.0),))
    transformer = jax.jit(lambda: init_model(0, MIXTRAL, config.Compute(), lora))()
    transformer = jax.tree.map(lambda x: x + 0.1, transformer)  # factors B begin at 0
    separated = separate_layers(transformer)
    assert separated.stacks[1].layers[0].ffn.separate_experts is not None
    assert transformer.stacks[0].layers[0].ffn.separate_experts is None  # the given model is as before
    decode = jax.jit(lambda model, *inputs: model.decode(*inputs)[0])
    for rows, length in ((1, 1), (3, 1), (4, 64)):
        tokens, positions = (np.random.default_rng(rows).integers(0, high, (rows, length), np.int32) for high in (300, 64))
        if length > 1:
            positions = np.where(np.arange(length) < 40, np.arange(length), -1) + 0 * positions
        inputs = [put_equal(x.astype(np.int32), jax.sharding.get_mesh(), P(BATCH, "context")) for x in (tokens, positions)]
        expected, computed = (
            decode(model, *inputs, empty_caches(model, MIXTRAL, rows, 64, np.dtype("float32")))
            for model in (transformer, separated)
        )
        np.testing.assert_allclose(computed, expected, rtol=1e-5, atol=1e-5)
    released = separate_layers(transformer, release=True)
    first, same = (jax.tree.leaves(model.stacks[1].layers[0].ffn) for model in (released, separated))
    np.testing.assert_array_equal(first[0], same[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(transformer.stacks[0].layers[0].ffn.gate_proj))


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
