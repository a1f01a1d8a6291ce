"""Flags of what is finite in a step: those of the model's own outputs, and of weights, outputs and gradients that are spoiled."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import PyTreeDef

from moe_train import config
from moe_train.data.batches.batch import Batch
from moe_train.model.parameters import Parameters, combine, parameters
from moe_train.model.transformer import abstract_model, init_model
from moe_train.run.not_finite import FirstFault, first_fault
from moe_train.train.finite import StepFlags, TokenPlaces, output_flags, step_flags
from moe_train.train.objectives.next_token import next_token
from moe_train.train.objectives.objective import ModelWeights, Objective, ObjectiveInputs, Terms
from moe_train.train.step_definition import StepDefinition
from tests.meshes import mesh_of

MODEL = config.Model(
    family="mistral",
    vocab_size=64,
    model_dim=16,
    num_layers=3,
    max_seq_len=32,
    attention=config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8),
    ffn=config.DenseFfn(name="dense", ffn_dim=16),
)
BATCH = Batch.synthetic(8, 16, 64, seed=0)


@functools.cache
def program(objective: Objective) -> tuple[Callable[..., StepFlags], PyTreeDef, Parameters]:
    """The compiled flags of a step on one device, the structure of the model, and its weights."""
    structure, weights = parameters(jax.jit(partial(init_model, 0, MODEL))())
    definition = StepDefinition(structure, objective, optax.sgd(0.1))
    return jax.jit(partial(step_flags, definition)), structure, weights


NEXT_TOKEN = next_token()


def flags_of(spoil: Callable[[Parameters], Parameters], objective: Objective = NEXT_TOKEN) -> tuple[StepFlags, FirstFault]:
    """The flags of a step with spoiled weights, on the host, and the first fault."""
    with jax.set_mesh(mesh_of(config.Mesh())):
        repeat, _, weights = program(objective)
        flags = jax.device_get(repeat(spoil(weights), ModelWeights({}, {}, {}), BATCH, None))
    return flags, first_fault(MODEL, flags)


def test_the_layers_are_run_as_the_model_runs_them() -> None:
    """An embedding that is no number makes the outputs of both not finite at the same positions."""
    with jax.set_mesh(mesh_of(config.Mesh())):
        _, structure, weights = program(NEXT_TOKEN)
        weights = dict(weights)
        # A product and not an indexed update, whose sharding JAX would ask for.
        spoiled = np.where(np.arange(MODEL.vocab_size) == BATCH.tokens[2, 5], np.float32(np.nan), np.float32(1))
        weights["embed.weight"] = weights["embed.weight"] * spoiled[:, None]
        model = combine(structure, weights)
        segments = BATCH.segment_ids.copy()
        segments[3:] = 0
        flags = jax.jit(output_flags)(model, BATCH.tokens, TokenPlaces(BATCH.positions, segments))
        hidden, _ = jax.jit(lambda m: m(BATCH.tokens, BATCH.positions, segments))(model)
    expected = np.isfinite(hidden).all(-1) | (segments == 0)
    has_token = (BATCH.tokens == BATCH.tokens[2, 5]).any(-1)
    # Earlier positions as well: attention multiplies the values that its mask excludes by 0, which keeps NaN.
    assert not expected[2].any() and expected[~has_token].all() and not has_token[:3].all()
    np.testing.assert_array_equal(flags["final_norm"], expected)
    np.testing.assert_array_equal(flags["embed"], (BATCH.tokens != BATCH.tokens[2, 5]) | (segments == 0))
    assert flags["stacks.0.layers.0.ffn"].shape == (3, 8, 16)


def test_a_spoiled_weight_is_named() -> None:
    path = "stacks.0.layers.0.ffn.down_proj.weight"

    def spoil(weights: Parameters) -> Parameters:
        return weights | {path: weights[path] * np.float32([1, np.nan, 1])[:, None, None]}

    flags, fault = flags_of(spoil)
    assert fault == FirstFault("the weights layer 1 ffn.down_proj", "weights")
    np.testing.assert_array_equal(flags.weights[path], [True, False, True])
    assert not flags.loss


def test_large_weights_make_an_output_overflow() -> None:
    path = "stacks.0.layers.0.attention.o_proj.weight"

    def spoil(weights: Parameters) -> Parameters:
        return weights | {
            path: weights[path] * np.float32([1, 1, 0])[:, None, None, None] + np.float32([0, 0, 3e38])[:, None, None, None]
        }

    _, fault = flags_of(spoil)
    assert (fault.what, fault.kind) == ("the output of layer 2 attention", "output")
    assert fault.bad_BT is not None and fault.bad_BT.any()


def test_a_gradient_of_a_custom_objective() -> None:
    def with_root(inputs: ObjectiveInputs, first_pass: object) -> Terms:
        terms = NEXT_TOKEN.loss(inputs, first_pass)
        return terms._replace(sum=terms.sum + jnp.sqrt(0 * terms.sum))  # the derivative of a root at 0 is infinite

    flags, fault = flags_of(dict, dataclasses.replace(NEXT_TOKEN, loss=with_root))
    assert fault == FirstFault("the gradient of head", "gradient") and flags.loss
    assert flags_of(dict)[1] == FirstFault("", "none")


def test_routers_and_experts_are_run_as_well() -> None:
    """Shapes alone, since the values are those of the layers of any model."""
    sparse = MODEL.model_copy(
        update={"family": "mixtral", "ffn": config.MoeFfn(name="moe", ffn_dim=16, num_experts=4, experts_per_token=2)}
    )
    with jax.set_mesh(mesh_of(config.Mesh())):
        places = TokenPlaces(BATCH.positions, BATCH.segment_ids)
        flags = jax.eval_shape(output_flags, abstract_model(sparse), BATCH.tokens, places)
    assert flags["stacks.0.layers.0.ffn"].shape == (3, 8, 16)
