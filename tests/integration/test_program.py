"""The compiled training step against a contract for each mesh: what is sent along which axis, to the byte.

Sizes are a device's, in bytes of float32. f, e, t, d are the mesh's sizes of fsdp, expert, tensor and data; what a device
receives of an array of s bytes along an axis of n is (n - 1) / n * s.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.machine.mesh import AXES, BATCH, make_mesh
from moe_train.model.moe.layer import MoE
from moe_train.model.moe.transport.chunks import bucket_size
from moe_train.model.moe.transport.transport import ExchangeSizes
from moe_train.plan import hlo
from moe_train.plan.compile import abstract_step
from moe_train.plan.replica_groups import axes_of
from moe_train.train.step import train_step

B, T, D, F, E, A, N, H, V = 8, 16, 32, 64, 8, 2, 8, 4, 64
MESHES = {
    "fsdp 8": {"fsdp": 8},
    "fsdp 2 x expert 4": {"fsdp": 2, "expert": 4},
    "expert 8": {"expert": 8},
    "tensor 2 x fsdp 4": {"tensor": 2, "fsdp": 4},
    "data 2 x fsdp 4": {"data": 2, "fsdp": 4},
}
TRANSPORT = {"fsdp 2 x expert 4": "all_gather", "expert 8": "all_to_all"}


@cache
def lowered(mesh: str, layers: int = 2, dtype: str = "float32", microbatches: int = 1) -> jax.stages.Lowered:
    """A step with plain kernels, of which no collective depends."""
    run = config.Config(
        name="x",
        run_dir="x",
        model=config.Model(
            family="mixtral",
            vocab_size=V,
            model_dim=D,
            num_layers=layers,
            attention=config.GroupedQueryAttention(num_heads=N, num_kv_heads=N, head_dim=H),
            ffn=config.MoeFfn(name="moe", ffn_dim=F, num_experts=E, experts_per_token=A),
        ),
        train=config.Train(steps=1, batch_size=B * microbatches, seq_len=T, microbatches=microbatches),
        optimizer=config.AdamW(name="adamw", learning_rate=1e-3),
        loss=config.Loss(load_balance_loss_coef=0.01, router_z_loss_coef=0.001),
        compute=config.Compute(
            dtype=dtype,  # type: ignore[arg-type]
            remat="full",
            attention="reference",
            grouped_matmul="reference",
            transport=TRANSPORT.get(mesh, "auto"),
        ),
        mesh=config.Mesh(**MESHES[mesh]),
    )
    devices = make_mesh(run.mesh)
    with jax.set_mesh(devices):
        definition, state, batch, _ = abstract_step(config.run_of(run), devices)
        return jax.jit(partial(train_step, definition), donate_argnums=0).lower(state, batch)


@cache
def program(mesh: str) -> hlo.Counts:
    text = lowered(mesh).compile().as_text()
    assert text is not None
    return hlo.count_program(text)


def sent(counts: hlo.Counts, mesh: str) -> Counter[tuple[str, tuple[str, ...]]]:
    """{(kind, axes): bytes}."""
    axes = {axis: MESHES[mesh].get(axis, 1) for axis in ("data", "fsdp", "expert", "context", "tensor")}
    found: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for c, times in counts.collectives.items():
        found[c.kind, axes_of(c.groups, axes)] += c.bytes * times  # type: ignore[assignment]
    return found


def contract(mesh: str) -> Counter[tuple[str, tuple[str, ...]]]:
    """Of weights and tokens; what is reduced besides is small (see `test_what_is_summed_is_small`)."""
    layers = 2
    d, f, e, t = (MESHES[mesh].get(axis, 1) for axis in ("data", "fsdp", "expert", "tensor"))
    of = lambda n, s: (n - 1) / n * s  # noqa: E731
    sums: Counter[tuple[str, tuple[str, ...]]] = Counter()

    def add(kind: str, axis: str, received: float) -> None:
        sums[kind, (axis,)] += received  # type: ignore[assignment]

    experts = 4 * 3 * E * D * F / (e * t)  # as computed with: split over E, never gathered over it
    add("all-gather", "fsdp", layers * 2 * of(f, experts))  # forward, and again in the backward pass
    add("reduce-scatter", "fsdp", layers * of(f, experts))
    add("all-reduce", "data", layers * 2 * of(d, experts / f))
    s = e  # all other matrices are split over expert too, where it divides them
    for size, times, gathers, gathered_last, scattered_first in (
        (4 * D * N * H, 3 * layers, 2, "fsdp", "fsdp"),  # q, k, v
        (4 * D * N * H, layers, 2, "fsdp", "expert"),  # o
        (4 * V * D, 2, 1, "expert", "expert"),  # embedding and head
    ):
        whole = size / t
        part = {"fsdp": whole / s, "expert": whole / f}  # whole along this axis alone
        for axis, n in (("fsdp", f), ("expert", s)):
            add("all-gather", axis, times * gathers * of(n, whole if axis == gathered_last else part[axis]))
            add("reduce-scatter", axis, times * of(n, whole if axis == scattered_first else part[axis]))
        add("all-reduce", "data", times * 2 * of(d, whole / (f * s)))

    tokens = B * T // (d * f * e)
    if TRANSPORT.get(mesh) == "all_gather":  # x and the rows' expert ids and weights there, sums back; x and dy again
        add("all-gather", "expert", layers * of(e, 4 * e * tokens * (3 * D + 2 * A + 2 * A)))
        add("reduce-scatter", "expert", layers * of(e, 4 * e * tokens * (2 * D + A)))
    elif e > 1:  # x there, y back; x and dy there, dx back; ids and weights, and the gradient of the weights
        rows = e * bucket_size(ExchangeSizes(tokens, D, A, e))
        add("all-to-all", "expert", layers * of(e, 4 * rows * (5 * D + 2 + 3)))
    return Counter({key: received for key, received in sums.items() if received})


@pytest.mark.parametrize("mesh", MESHES)
def test_every_byte_is_in_the_contract(mesh: str) -> None:
    found, wanted = sent(program(mesh), mesh), contract(mesh)
    summed = {key for key in found if key[0] == "all-reduce"}
    assert {key: found[key] for key in found.keys() - summed} == {k: n for k, n in wanted.items() if k[0] != "all-reduce"}


@pytest.mark.parametrize("mesh", MESHES)
def test_what_is_summed_is_small(mesh: str) -> None:
    """Gradients of norms and routers, and the figures of the routers; over data the weights' gradients, over tensor
    activations. No gradient of a whole matrix."""
    found, wanted = sent(program(mesh), mesh), contract(mesh)
    tokens = 4 * B * T // 4 * D  # activations of a device where tensor is 2
    allowed = Counter({("all-reduce", ("data",)): wanted["all-reduce", ("data",)]})
    if mesh.startswith("tensor"):  # of each layer forward, recomputed and backward, and of both ends
        allowed["all-reduce", ("tensor",)] = (2 * 7 + 2) * tokens * 1.1  # type: ignore[assignment]
    rest = {key: n - allowed[key] for key, n in found.items() if key[0] == "all-reduce"}
    whole_once = 2 * 4 * (2 * 2 * D + D + 2 * D * E)
    assert sum(n for n in rest.values() if n > 0) < whole_once + 1500, rest


@pytest.mark.parametrize("microbatches", [1, 2])
def test_gradients_cross_replicas_in_the_dtype_of_the_computation(microbatches: int) -> None:
    """As the program asks for it: XLA:CPU makes float32 of every sum. All matrices do; float32 are figures of the routers."""
    asked = hlo.count_program(lowered("data 2 x fsdp 4", dtype="bfloat16", microbatches=microbatches).as_text(dialect="hlo"))
    sizes = dict.fromkeys(AXES, 1) | MESHES["data 2 x fsdp 4"]
    crossing = [c for c in asked.collectives if "data" in axes_of(c.groups, sizes)]
    gathered = {"float32": [c for c in crossing if c.dtype == "f32"], "bfloat16": [c for c in crossing if c.dtype == "bf16"]}
    assert max(c.bytes for c in gathered["bfloat16"]) >= 2 * E * D * F / 4
    assert max((c.bytes for c in gathered["float32"]), default=0) <= 4 * max(E, 2 * D)


def test_the_program_does_not_grow_with_depth() -> None:
    shallow, deep = (lowered("fsdp 8", layers).as_text() for layers in (2, 7))
    assert shallow.count("\n") == deep.count("\n")


def test_experts_cost_three_units_on_a_tpu() -> None:
    """Forward and backward of the MoE layer, lowered for a TPU: each assignment meets its own expert alone."""
    D, F, R = 256, 512, 2 * 512 * A
    device = AbstractDevice(device_kind="TPU v5", num_cores=2, platform="tpu")
    mesh = AbstractMesh((1,) * len(AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES), abstract_device=device)
    model = config.Model(
        family="mixtral",
        vocab_size=V,
        model_dim=D,
        num_layers=1,
        attention=config.GroupedQueryAttention(num_heads=N, num_kv_heads=N, head_dim=H),
        ffn=config.MoeFfn(name="moe", ffn_dim=F, num_experts=E, experts_per_token=A),
    )
    compute = config.Compute(dtype="bfloat16", param_dtype="bfloat16")
    with jax.sharding.use_abstract_mesh(mesh):
        layer = jax.eval_shape(lambda: MoE(nnx.Rngs(0), model, compute, model.ffn))
        x = jax.ShapeDtypeStruct((2, 512, D), jnp.bfloat16, sharding=NamedSharding(mesh, P(BATCH, "context", None)))
        segments = jax.ShapeDtypeStruct((2, 512), jnp.int32, sharding=NamedSharding(mesh, P(BATCH, "context")))
        both = jax.jit(jax.grad(lambda layer, x, s: jnp.sum(layer(x, s)[0].astype(jnp.float32)), argnums=(0, 1)))
        text = both.trace(layer, x, segments).lower(lowering_platforms=("tpu",)).as_text(dialect="hlo")
    counts, product = hlo.count_program(text), 2 * R * D * F
    assert counts.kernels.total() == 9  # of three matrices: forward, for x, for the weight
    stated = [int(flops) for flops in re.findall(r'"flops": ?(\d+)', text)]  # the kernel of weight gradients states none
    assert stated == [product] * 6
    assert counts.flops < 0.05 * 9 * product  # the router's
