"""Gathered weights: the same products and gradients as without a mesh, and no collective carries more than it has to."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.data.batches.batch import Batch
from moe_train.machine.mesh import BATCH, make_mesh, put_batch
from moe_train.model.parameters import parameters
from moe_train.model.sharding import fsdp, specs
from moe_train.model.transformer import abstract_model
from moe_train.train.gradients import step_gradients
from moe_train.train.objectives.next_token import next_token
from moe_train.train.objectives.objective import ModelWeights
from moe_train.train.step_definition import StepDefinition

MESHES = {
    "fsdp, tensor": make_mesh(config.Mesh(fsdp=4, tensor=2)),
    "data, fsdp, expert": make_mesh(config.Mesh(data=2, fsdp=2, expert=2)),
    "expert, tensor": make_mesh(config.Mesh(expert=4, tensor=2)),
}
EQUATIONS = {  # equation: shape of the weight, and its spec
    "BTD,DNH->BTNH": ((16, 8, 6), P("fsdp", specs.TENSOR_AND_EXPERT, None)),
    "BTNH,NHD->BTD": ((8, 6, 16), P(specs.TENSOR_AND_EXPERT, None, "fsdp")),
    "BTD,DF->BTF": ((16, 10), P("fsdp", "tensor")),
    "BTF,FD->BTD": ((10, 16), P("tensor", "fsdp")),
    "BTD,VD->BTV": ((12, 16), P("tensor", "fsdp")),
}
SIZES = {"B": 8, "T": 3, "D": 16, "N": 8, "H": 6, "F": 10, "V": 12}


def put(mesh: Mesh, x: np.ndarray, spec: P) -> jax.Array:
    return jax.device_put(x, NamedSharding(mesh, spec))


def close(found: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(jax.device_get(found), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("equation", EQUATIONS)
def test_project_is_einsum(equation: str, mesh: Mesh) -> None:
    rng, (shape, spec) = np.random.default_rng(0), EQUATIONS[equation]
    x_letters, y_letters = equation.split(",")[0], equation.split("->")[1]
    x, dy = (rng.normal(size=[SIZES[letter] for letter in letters]).astype(np.float32) for letters in (x_letters, y_letters))
    w = rng.normal(size=shape).astype(np.float32)

    @jax.jit
    def run(x: jax.Array, w: jax.Array, dy: jax.Array) -> Any:
        y, vjp = jax.vjp(lambda x, w: fsdp.project(equation, x, w), x, w)
        return y, *vjp(dy)

    with jax.set_mesh(mesh):
        x_spec, y_spec = (specs.activation_spec(letters) for letters in (x_letters, y_letters))
        y, dx, dw = run(put(mesh, x, x_spec), put(mesh, w, spec), put(mesh, dy, y_spec))
        assert (y.sharding.spec, dx.sharding.spec, dw.sharding.spec) == (y_spec, x_spec, spec)
    close(y, np.einsum(equation, x, w))
    w_letters = equation.split("->")[0].split(",")[1]
    close(dx, np.einsum(f"{y_letters},{w_letters}->{x_letters}", dy, w))
    close(dw, np.einsum(f"{x_letters},{y_letters}->{w_letters}", x, dy))


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("rows", ["tensor", specs.TENSOR_AND_EXPERT])
def test_lookup_is_indexing(mesh: Mesh, rows: Any) -> None:
    rng = np.random.default_rng(0)
    table, tokens = rng.normal(size=(16, 16)).astype(np.float32), rng.integers(0, 16, (8, 3)).astype(np.int32)
    dy = rng.normal(size=(8, 3, 16)).astype(np.float32)

    @jax.jit
    def run(table: jax.Array, tokens: jax.Array, dy: jax.Array) -> Any:
        y, vjp = jax.vjp(lambda table: fsdp.lookup(table, tokens, jnp.dtype("float32")), table)
        return y, *vjp(dy)

    with jax.set_mesh(mesh):
        spec = P(BATCH, "context", None)
        y, dtable = run(put(mesh, table, P(rows, "fsdp")), put(mesh, tokens, P(BATCH, "context")), put(mesh, dy, spec))
    np.testing.assert_array_equal(jax.device_get(y), table[tokens])
    wanted = np.zeros_like(table)
    np.add.at(wanted, tokens, dy)
    close(dtable, wanted)


NOTATIONS = """
  %all-reduce.1 = (f32[4,8]{1,0}, bf16[]{:T(128)}) all-reduce(%a, %b), channel_id=1, replica_groups={{0,4},{1,5}}, use
  ROOT %x = s32[7]{0} all-gather-start(%a), replica_groups=[2,4]<=[8]T(1,0), dimensions={0}
  %y = pred[1,2]{1,0} all-gather(%a), replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([8]) {'a','c'}, dimensions={0}
  %alone = f32[9]{0} all-reduce(%a), replica_groups={{0},{1}}, to_apply=%add
%all-reduce-scatter.1 (input: bf16[8,3]) -> bf16[2,3] {
  %all-reduce.2 = bf16[8,3]{1,0} all-reduce(%input), replica_groups=[2,4]<=[8]
}
%next (input: bf16[8,3]) -> bf16[2,3] {
  %all-reduce.3 = bf16[8,3]{1,0} all-reduce(%input), replica_groups=[2,4]<=[8]
"""


def test_collectives_are_read_in_every_notation(collectives: Any) -> None:
    assert collectives(NOTATIONS) == [
        ("all-reduce", 2, [(4, 8), ()]),
        ("all-gather", 4, [(7,)]),
        ("all-gather", 8, [(1, 2)]),
        ("reduce-scatter", 4, [(2, 3)]),
        ("all-reduce", 4, [(8, 3)]),
    ]


MODEL = config.Model(
    family="mixtral",
    vocab_size=48,
    model_dim=40,
    num_layers=2,
    attention=config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=6),
    ffn=config.MoeFfn(name="moe", ffn_dim=56, num_experts=4, experts_per_token=2),
)


@pytest.fixture(scope="module")
def program(collectives: Any) -> tuple[dict[str, dict[str, tuple[int, ...]]], list[Any]]:
    """Loss and gradients on a mesh: ({path: its shape on a device gathered over fsdp, and as stored}, collectives)."""
    mesh = MESHES["data, fsdp, expert"]
    with jax.set_mesh(mesh):
        structure, like = parameters(abstract_model(MODEL, config.Compute()))
        params = {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec)) for p, x in like.items()}
        batch = put_batch(Batch(*(np.ones((8, 24), dtype) for dtype in (np.int32, np.int32, bool, np.int32, np.int32))), mesh)
        coefs = config.Loss(load_balance_loss_coef=0.01, router_z_loss_coef=0.001)
        definition = StepDefinition(structure, next_token(), optax.identity(), coefs)
        gradients = lambda params, batch: step_gradients(definition, params, ModelWeights({}, {}, {}), batch, None)  # noqa: E731
        compiled = jax.jit(gradients).lower(params, batch).compile()
    shapes = {}
    for path, x in params.items():
        layer = slice(1 if path.startswith("stacks") else 0, None)
        stored = x.sharding.shard_shape(x.shape)[layer]
        spec = (tuple(x.sharding.spec) + (None,) * x.ndim)[: x.ndim][layer]
        over_fsdp = tuple(2 * n if axis == "fsdp" else n for n, axis in zip(stored, spec, strict=True))
        over_expert = tuple(2 * n if axis == specs.TENSOR_AND_EXPERT else n for n, axis in zip(stored, spec, strict=True))
        whole = tuple(2 * n if axis == specs.TENSOR_AND_EXPERT else n for n, axis in zip(over_fsdp, spec, strict=True))
        if "fsdp" in spec:
            shapes[path] = {"stored": stored, "over fsdp": over_fsdp, "over expert": over_expert, "whole": whole}
    return shapes, collectives(compiled.as_text())


def test_gathered_weights_have_their_gradient_scattered(program: Any) -> None:
    shapes, found = program
    scattered = [shape for kind, size, group in found if kind == "reduce-scatter" and size == 2 for shape in group]
    summed = [shape for kind, _, group in found if kind == "all-reduce" for shape in group]
    assert len(shapes) == 9
    for path, of in shapes.items():
        assert of["whole"] not in summed, f"{path}: the whole gradient {of['whole']} is summed over devices"
        assert of["stored"] in scattered, f"{path}: no reduce-scatter to {of['stored']}"
        assert of["stored"] in summed, f"{path}: scattered, {of['stored']} is summed over data"


def test_only_weights_and_tokens_are_gathered(program: Any) -> None:
    """What `all-gather` makes is a weight gathered over fsdp or expert, or tokens gathered over expert."""
    shapes, found = program
    gathered = {of[stage] for of in shapes.values() for stage in ("over fsdp", "over expert", "whole")}
    tokens = 2 * 24
    for kind, _, group in found:
        if kind == "all-gather":
            for shape in group:
                assert shape in gathered or shape[0] == tokens, f"all-gather to {shape}"
