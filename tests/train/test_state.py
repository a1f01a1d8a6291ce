"""Which parameters a step trains, which it moves by rule, and which stay."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_train import config
from moe_train.train.state import create_state, partition, split_buffers, trained_in_full
from tests.meshes import mesh_of

QUERY = "stacks.0.layers.0.attention.q_proj"
ROUTER = "stacks.0.layers.0.ffn.router"
PATHS = ("embed.weight", f"{QUERY}.weight", f"{QUERY}.lora_a", f"{QUERY}.lora_b", f"{ROUTER}.weight", f"{ROUTER}.bias")
PARAMETERS = {path: np.full(2, i, np.float32) for i, path in enumerate(PATHS)}
ADAPTERS = {f"{QUERY}.lora_a", f"{QUERY}.lora_b"}
TARGETS = (config.LoraTarget(modules=("attention.q_proj",), rank=2, alpha=4.0),)
ALONE = config.Lora(targets=TARGETS)
WITH_ROUTER = config.Lora(targets=TARGETS, train=("ffn.router",))


def test_full_training_learns_everything() -> None:
    assert partition(PARAMETERS, None) == (PARAMETERS, {})
    assert trained_in_full(PARAMETERS, None) == {}


def test_adapters_leave_the_base_frozen() -> None:
    learned, frozen = partition(PARAMETERS, ALONE)
    assert learned.keys() == ADAPTERS and frozen.keys() == PARAMETERS.keys() - ADAPTERS
    assert trained_in_full(learned, ALONE) == {}


def test_a_router_that_is_trained_beside_adapters_brings_its_bias() -> None:
    learned, frozen = partition(PARAMETERS, WITH_ROUTER)
    assert learned.keys() == {*ADAPTERS, f"{ROUTER}.weight", f"{ROUTER}.bias"}
    assert frozen.keys() == {"embed.weight", f"{QUERY}.weight"}
    assert trained_in_full(learned, WITH_ROUTER).keys() == {f"{ROUTER}.weight", f"{ROUTER}.bias"}


def test_a_routers_bias_has_no_gradient() -> None:
    trainable, buffers = split_buffers(PARAMETERS)
    assert list(buffers) == [f"{ROUTER}.bias"] and trainable.keys() == PARAMETERS.keys() - buffers.keys()


def test_a_new_state_is_at_step_zero_and_has_moments_of_what_is_trained() -> None:
    params = {path: jnp.asarray(x) for path, x in PARAMETERS.items()}
    with jax.set_mesh(mesh_of(config.Mesh())):
        state = jax.eval_shape(lambda: create_state(params, optax.trace(0.9), WITH_ROUTER))
    assert (state.step.dtype, state.skipped.dtype) == (jnp.int32, jnp.int32)
    assert state.trainable.keys() == {*ADAPTERS, f"{ROUTER}.weight"} == state.opt_state.trace.keys()
    assert state.learned.keys() == {*ADAPTERS, f"{ROUTER}.weight", f"{ROUTER}.bias"}
    assert state.frozen.keys() == {"embed.weight", f"{QUERY}.weight"}
