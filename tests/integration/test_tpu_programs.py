"""The train step compiled for a TPU slice that is not here: kernels, collectives, memory. Needs libtpu."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.config import yaml_file
from moe_train.data.batches.batch import Batch
from moe_train.machine.devices import DEVICES
from moe_train.machine.mesh import BATCH, make_mesh
from moe_train.model.parameters import parameters
from moe_train.model.sharding.specs import TENSOR_AND_EXPERT
from moe_train.model.transformer import abstract_model
from moe_train.plan import hlo
from moe_train.plan.choice import model_choice
from moe_train.plan.compile import compile_config
from moe_train.plan.replica_groups import axes_of
from moe_train.plan.topology import parse_topology
from moe_train.train.optimizer import make_optimizer
from moe_train.train.state import create_state
from moe_train.train.step import compile_step
from moe_train.train.step_definition import definition_of

ROOT = Path(__file__).parents[2]
GIB = 2**30

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not here; run: bash launch/install.sh tpu"),
]


@pytest.fixture(scope="module", autouse=True)
def no_tpu_to_ask() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        patch.setenv("TPU_ACCELERATOR_TYPE", "v5p-8")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other processes may compile too
        yield


def compiled(topology: str, *overrides: str) -> tuple[Any, dict[str, Any]]:
    """The recipe's step, and {path: abstract weight}."""
    overrides = ("compute.remat=full", "mesh={fsdp: 8, expert: 8}", *overrides)
    run = config.run_of(yaml_file.load_config(ROOT / "configs" / "mixtral_8x7b_pretrain_v5p.yaml", overrides))
    mesh = make_mesh(run.mesh, topologies.get_topology_desc(f"v5p:{topology}", platform="tpu").devices)

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        spec = P() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        optimizer = make_optimizer(run.optimizer, 1000)
        structure, params = parameters(abstract_model(run.model, run.compute))
        params = jax.tree.map(placed, params)
        state = jax.tree.map(placed, jax.eval_shape(lambda params: create_state(params, optimizer), params))
        shape, sharding = (run.train.batch_size, run.train.seq_len), NamedSharding(mesh, P(BATCH, "context"))
        dtypes = (jnp.int32, jnp.int32, jnp.bool, jnp.int32, jnp.int32)
        batch = Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in dtypes))
        return compile_step(definition_of(run, structure, optimizer), state, batch), params


def check(program: Any, params: dict[str, Any], collectives: Any) -> None:
    text = program.as_text()
    names = [line.split()[0] for line in text.splitlines() if "tpu_custom_call" in line]  # %transpose_jvp_jit_tgmm___.1
    for kernel, calls in (("gmm", 9), ("tgmm", 3), ("splash_mqa_fwd", 2), ("splash_mqa_dq", 1), ("splash_mqa_dkv", 1)):
        # full rematerialisation: three products forward, again, and backward for x; three for the weights
        assert sum(bool(re.search(rf"[%_]{kernel}(?![a-z])", name)) for name in names) == calls, kernel
    found = collectives(text)
    summed = [tuple(n for n in shape if n > 1) for kind, _, group in found if kind == "all-reduce" for shape in group]
    scattered = [tuple(n for n in shape if n > 1) for kind, _, group in found if kind == "reduce-scatter" for shape in group]
    for path, x in params.items():
        spec = tuple(x.sharding.spec)
        if "fsdp" in spec:
            layer = slice(1 if path.startswith("stacks") else 0, None)
            stored, sizes = x.sharding.shard_shape(x.shape), x.sharding.mesh.shape
            times = {"fsdp": sizes["fsdp"], TENSOR_AND_EXPERT: sizes["expert"]}
            whole = tuple(n * times.get(axis, 1) for n, axis in zip(stored, spec, strict=False))
            whole, stored = (tuple(n for n in shape[layer] if n > 1) for shape in (whole, stored))
            assert whole not in summed, f"{path}: its whole gradient {whole} is summed over devices"
            assert stored in scattered, f"{path}: no reduce-scatter to {stored}"


TINY = ("model.num_layers=2", "model.model_dim=1024", "model.ffn.ffn_dim=2048", "model.vocab_size=1024", "train.seq_len=1024")
TINY += ("model.attention.num_heads=8", "model.attention.num_kv_heads=2", "train.batch_size=8", "train.microbatches=1")


@pytest.mark.parametrize("experts", [2, 8], ids=["one expert a device", "four experts a device"])
def test_small_step(experts: int, collectives: Any) -> None:
    program, params = compiled("2x2x2", *TINY, f"model.ffn.num_experts={experts}", "mesh.fsdp=4", "mesh.expert=2")
    check(program, params, collectives)


def test_a_sequence_on_two_chips(collectives: Any) -> None:
    """Keys and values of the whole are gathered; queries of the halves change places, and no collective has their whole."""
    meshes = ("mesh.fsdp=2", "mesh.expert=2", "mesh.context=2")
    program, params = compiled("2x2x2", *TINY, *meshes)
    check(program, params, collectives)
    found = [group for kind, _, group in collectives(program.as_text()) if kind == "all-gather"]
    gathered = {tuple(sorted(n for n in shape if n > 1)) for group in found for shape in group}
    assert (2, 2, 128, 1024) in gathered and (2, 8, 128, 1024) not in gathered  # two sequences, two key heads, eight of queries


@pytest.mark.parametrize(
    "mesh",
    [("mesh.fsdp=8",), ("mesh.data=2", "mesh.fsdp=4", "model.model_dim=512")],
    ids=["of all chips", "of half the chips, whose parts have 128 lanes"],
)
def test_fsdp_alone_scatters_gradients(mesh: tuple[str, ...]) -> None:
    """Along an axis of all chips of a replica, and where parts are narrow, the compiler would sum whole gradients."""
    program, params = compiled("2x2x2", *TINY, "mesh.expert=1", *mesh)
    gradients = sum(2 * math.prod(x.shape) for x in params.values())
    sizes = next(iter(params.values())).sharding.mesh.shape
    received = dict.fromkeys(("all-reduce", "reduce-scatter"), 0.0)
    for c, times in hlo.count_program(program.as_text()).collectives.items():
        if c.kind in received and axes_of(c.groups, sizes) == ("fsdp",):
            received[c.kind] += c.bytes * times
    fsdp = sizes["fsdp"]
    assert received["reduce-scatter"] == pytest.approx((fsdp - 1) / fsdp * gradients, rel=0.05)
    assert received["all-reduce"] < 0.02 * gradients


def test_gradients_cross_the_data_axis_once(collectives: Any) -> None:
    """Two microbatches in each of two replicas, each with a part of the weights on four chips: what crosses has the size
    of a chip's part of a stack's weights, and so is summed after all layers and microbatches."""
    meshes = ("mesh.data=2", "mesh.fsdp=2", "mesh.expert=2", "train.batch_size=16", "train.microbatches=2")
    program, params = compiled("2x2x2", *TINY, *meshes)
    found = hlo.count_program(program.as_text()).collectives
    sizes = {"data": 2, "fsdp": 2, "expert": 2, "context": 1, "tensor": 1}
    across = [(c, times) for c, times in found.items() if "data" in axes_of(c.groups, sizes)]
    gradients = sum(2 * math.prod(x.sharding.shard_shape(x.shape)) for x in params.values())  # in bfloat16, as computed
    assert gradients <= sum(times * c.bytes for c, times in across) < 1.05 * gradients
    assert all(times == 1 for c, times in across if c.bytes > 20_000)


def test_mixtral_8x7b(collectives: Any) -> None:
    """64 chips, one sequence of 4096 tokens each; tokens are sent to their experts."""
    program, params = compiled("4x4x4", "train.batch_size=64", "train.microbatches=1")
    check(program, params, collectives)
    memory = program.memory_analysis()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes + kept < 18 * GIB
    sizes = {"data": 1, "fsdp": 8, "expert": 8, "context": 1, "tensor": 1}
    moved = {"reduce-scatter": 0.0, "all-gather": 0.0}
    beside_products = dict(moved)  # as compiler_options says
    for c, times in hlo.count_program(program.as_text()).collectives.items():
        if c.kind in moved and axes_of(c.groups, sizes) == ("fsdp",):
            moved[c.kind] += c.bytes * times
            beside_products[c.kind] += c.bytes * times * (c.hidden_flops > 0)
    assert moved == {"reduce-scatter": pytest.approx(11.4e9, rel=0.02), "all-gather": pytest.approx(24.5e9, rel=0.02)}
    assert all(beside_products[kind] > 0.95 * moved[kind] for kind in moved)


ONE_EACH = {"v5e:2x2": ("mesh={expert: 4}", "train.batch_size=4"), "v5e:2x4": ("mesh={expert: 8}", "train.batch_size=8")}


@pytest.mark.parametrize(
    ("topology", "num_layers", "overrides"),
    [
        ("v5e:2x2", 32, ("lora.quantize={name: nf4}", "train.seq_len=4096")),
        ("v5e:2x2", 2, ("lora.quantize={name: nf4}", "train.seq_len=1024")),
        ("v5e:2x4", 32, ("train.seq_len=2048",)),
    ],
    ids=["nf4", "nf4 in two layers", "bfloat16"],
)
def test_adapters_of_mixtral_8x7b_fit_into_16_gb_a_chip(topology: str, num_layers: int, overrides: tuple[str, ...]) -> None:
    """A sequence on each chip; `plan` says so too. Codes of all layers exist once: laid out anew beside, they would not fit."""
    model, place = yaml_file.load_config(ROOT / "configs" / "mixtral_8x7b_pretrain_v5p.yaml").model, parse_topology(topology)
    assert model is not None
    adapters = [*ONE_EACH[topology], *overrides, "train.microbatches=1"]
    run = yaml_file.load_config(ROOT / "configs" / "mixtral_8x7b_lora_v5e.yaml", adapters)
    run = run.model_copy(update={"model": model.model_copy(update={"num_layers": num_layers})})
    choice = model_choice(config.run_of(run), place)
    needed = compile_config(choice.run, place).bytes_per_device
    assert needed < DEVICES["v5e"].hbm_bytes
    assert choice.memory.total == pytest.approx(needed, rel=0.1)
