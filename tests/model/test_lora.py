"""Adapters: which modules get one, how it starts, how it is split; a fresh adapter changes nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.mesh import make_mesh, put_batch
from moe_train.model.lora import is_lora
from moe_train.model.transformer import Transformer, init_model, parameters
from tests.model.conftest import quick_jit

MODEL = config.Model(
    family="mixtral",
    vocab_size=24,
    model_dim=8,
    num_layers=2,
    attention=config.Attention(num_heads=4, num_kv_heads=2, head_dim=6),
    ffn=config.MoeFfn(name="moe", ffn_dim=12, num_experts=4, experts_per_token=2),
)
ONE = make_mesh(config.Mesh(), jax.devices()[:1])
EIGHT = make_mesh(config.Mesh(fsdp=2, expert=2, tensor=2))


def lora_of(*targets: tuple[tuple[str, ...], int, float]) -> config.Lora:
    return config.Lora(targets=tuple(config.LoraTarget(modules=m, rank=rank, alpha=alpha) for m, rank, alpha in targets))


def abstract(lora: config.Lora) -> Transformer:
    return jax.eval_shape(lambda: init_model(0, MODEL, config.Compute(), lora))


def test_patterns_name_modules_and_carry_their_rank() -> None:
    with jax.set_mesh(EIGHT):
        model = abstract(lora_of((("attention.[qv]_proj", "attention.o_proj"), 3, 6.0), (("ffn.*",), 2, 8.0)))
    found = {
        path.removeprefix("stacks.0.layers.0."): (x.shape, x.sharding.spec)
        for path, x in parameters(model)[1].items()
        if is_lora(path)
    }
    into, out = ((2, 4, 8, 2), P(None, "expert", None, None)), ((2, 4, 2, 8), P(None, "expert", None, None))
    assert found == {
        "attention.q_proj.lora_a": ((2, 8, 3), P(None, "fsdp", None)),
        "attention.q_proj.lora_b": ((2, 3, 4, 6), P(None, None, ("tensor", "expert"), None)),
        "attention.v_proj.lora_a": ((2, 8, 3), P(None, "fsdp", None)),
        "attention.v_proj.lora_b": ((2, 3, 2, 6), P(None, None, "tensor", None)),
        "attention.o_proj.lora_a": ((2, 4, 6, 3), P(None, ("tensor", "expert"), None, None)),
        "attention.o_proj.lora_b": ((2, 3, 8), P(None, None, "fsdp")),
        "ffn.gate_proj.lora_a": into,
        "ffn.up_proj.lora_a": into,
        "ffn.down_proj.lora_b": out,
        "ffn.gate_proj.lora_b": ((2, 4, 2, 12), P(None, "expert", None, "tensor")),
        "ffn.up_proj.lora_b": ((2, 4, 2, 12), P(None, "expert", None, "tensor")),
        "ffn.down_proj.lora_a": ((2, 4, 12, 2), P(None, "expert", "tensor", None)),
    }
    (layer,) = model.stacks[0].layers
    assert layer.attention.q_proj.lora_scale == 2.0 and layer.ffn.down_proj.lora_scale == 4.0
    assert layer.attention.k_proj.lora_a is None


def test_a_fresh_adapter_changes_nothing() -> None:
    """B is zero; A is uniform in ±1/sqrt(fan-in), another draw for each layer and expert; the weights are the same."""
    lora = lora_of((("attention.q_proj", "ffn.up_proj"), 2, 4.0))
    ids, segments = np.arange(20, dtype=np.int32).reshape(2, 10), np.ones((2, 10), np.int32)

    @partial(quick_jit, static_argnums=0)
    def made(lora: config.Lora | None, *tokens: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        model = init_model(0, MODEL, config.Compute(), lora)
        return parameters(model)[1], model.logits(model(*tokens)[0])

    with jax.set_mesh(ONE):
        tokens = put_batch((ids, ids % 10, segments), ONE)
        (base, wanted), (both, found) = (jax.device_get(made(x, *tokens)) for x in (None, lora))
    np.testing.assert_array_equal(found, wanted)
    jax.tree.map(np.testing.assert_array_equal, {path: both[path] for path in base}, base)
    for path in both.keys() - base.keys():
        if path.endswith("lora_b"):
            assert not both[path].any(), path
        else:
            batch = 2 if ".ffn." in path else 1
            bound = np.prod(both[path].shape[batch:-1]) ** -0.5
            assert 0.8 * bound < np.max(np.abs(both[path])) <= bound, path
            draws = both[path].reshape(-1, np.prod(both[path].shape[batch:]))
            assert len(np.unique(draws, axis=0)) == len(draws), path


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (((("attention.w_proj",), 2, 4.0),), "'attention.w_proj' names no module; there are attention.k_proj, attention.o_proj"),
        (((("*.router",), 2, 4.0),), "'*.router' names no module"),
        (((("attention.*",), 2, 4.0), (("*.q_proj",), 4, 4.0)), "attention.q_proj is named twice, by 'attention.*' and '*.q_proj'"),
    ],
)
def test_patterns_that_cannot_be_meant(targets: Any, message: str) -> None:
    with jax.set_mesh(ONE), pytest.raises(ValueError) as error:
        abstract(lora_of(*targets))
    assert message in str(error.value) and "\n" not in str(error.value)
