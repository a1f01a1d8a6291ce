"""The traffic model against the collectives of a compiled program, and its parts against sums by hand."""

from __future__ import annotations

import jax
import pytest

from moe_train import config
from moe_train.machine.mesh import make_mesh
from moe_train.model.moe.transport import all_gather, all_to_all
from moe_train.model.moe.transport.transport import ExchangeSizes, bytes_received
from moe_train.plan.compile import compile_on
from moe_train.plan.traffic import Flow, flows, microbatch_shape
from moe_train.plan.weights import layout
from tests.plan.pretraining import LATENT, pretrain_run

SMALL = ("model.num_layers=2", "model.model_dim=128", "model.ffn.ffn_dim=256", "model.vocab_size=256", "train.seq_len=128")
SMALL += ("model.attention={num_heads: 8, num_kv_heads: 8, head_dim: 16}", "train.batch_size=16", "train.microbatches=1")
SMALL += ("compute.dtype=float32",)


def modelled(run: config.Run) -> list[Flow]:
    return flows(run, layout(run))


@pytest.mark.parametrize(
    "mesh",
    [
        ("mesh.data=2", "mesh.fsdp=2", "mesh.expert=2", "train.microbatches=2"),
        pytest.param(("mesh.data=2", "mesh.fsdp=2", "mesh.expert=2"), marks=pytest.mark.slow),
        pytest.param(("mesh.fsdp=2", "mesh.expert=4"), marks=pytest.mark.slow),
        pytest.param(("mesh.fsdp=1", "mesh.expert=2", "mesh.context=2", "mesh.tensor=2"), marks=pytest.mark.slow),
        pytest.param(("mesh.fsdp=2", "mesh.expert=1", "mesh.context=4"), marks=pytest.mark.slow),
        pytest.param(("mesh.fsdp=2", "mesh.expert=4", "train.microbatches=2", "loss.balance_over=step"), marks=pytest.mark.slow),
        pytest.param((LATENT, "mesh.fsdp=2", "mesh.expert=1", "mesh.context=4"), marks=pytest.mark.slow),
        pytest.param((LATENT, "mesh.fsdp=1", "mesh.expert=1", "mesh.context=4", "mesh.tensor=2"), marks=pytest.mark.slow),
    ],
    ids=[
        "data and microbatches",
        "data",
        "expert",
        "context and tensor",
        "context",
        "balance over the step",
        "latents",
        "latents and tensor",
    ],
)
def test_bytes_are_those_of_the_compiled_program(mesh: tuple[str, ...]) -> None:
    run = pretrain_run(*SMALL, *mesh)
    program = compile_on(run, make_mesh(run.mesh))
    assert sum(flow.bytes for flow in modelled(run)) == pytest.approx(program.network_bytes, rel=0.1)


def test_mixtral_8x7b_on_64_chips() -> None:
    """By hand, as the sums of the received parts of each weight and token; 50.3 GB in the compiled program."""
    run = pretrain_run("train.batch_size=64", "train.microbatches=1")
    found = {(flow.what, flow.kind, flow.axis): flow.bytes for flow in modelled(run)}
    experts = 32 * 3 * 4096 * 14336 * 2  # one expert of each layer, bfloat16
    assert found["expert weights", "all-gather", "fsdp"] == 2 * experts * 7 / 8
    assert found["expert weights", "reduce-scatter", "fsdp"] == experts * 7 / 8
    attention = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024) * 2
    assert found["weights", "all-gather", "fsdp"] == 2 * attention * 7 / 8
    assert found["weights", "all-gather", "expert"] == 2 * attention / 8 * 7 / 8
    rows = 7 * 1280  # of 8192 assignments a quarter more than an eighth to each other device
    assert found["tokens to experts", "all-to-all", "expert"] == 32 * 5 * rows * 4096 * 2
    assert sum(found.values()) == pytest.approx(50.3e9, rel=0.005)


def test_frozen_weights_are_gathered_and_have_no_gradients() -> None:
    lora = "lora={targets: [{modules: ['attention.*'], rank: 4, alpha: 8}]}"
    found = modelled(pretrain_run(*SMALL, lora, "loss={}", "mesh.fsdp=2", "mesh.expert=4"))
    assert sum(flow.bytes for flow in found if flow.what == "expert weights" and flow.kind == "reduce-scatter") == 0
    assert sum(flow.bytes for flow in found if flow.what == "expert weights" and flow.kind == "all-gather") > 0


def test_microbatches_gather_weights_again_and_sum_over_replicas_once() -> None:
    one, four = (
        {
            (f.what, f.kind, f.axis): f.bytes
            for f in modelled(pretrain_run(*SMALL, "mesh.data=2", "mesh.fsdp=2", "mesh.expert=2", m))
        }
        for m in ("train.microbatches=1", "train.microbatches=2")
    )
    assert four["expert weights", "all-gather", "fsdp"] == 2 * one["expert weights", "all-gather", "fsdp"]
    assert four["gradients", "all-reduce", "data"] == one["gradients", "all-reduce", "data"]


def test_balance_over_the_step_gathers_weights_for_one_more_forward_pass() -> None:
    common = (*SMALL, "mesh.fsdp=2", "mesh.expert=4", "train.microbatches=2")
    each, step = (
        {(f.what, f.kind, f.axis): f.bytes for f in modelled(pretrain_run(*common, f"loss.balance_over={over}"))}
        for over in ("microbatch", "step")
    )
    gathered, scattered = ("expert weights", "all-gather", "fsdp"), ("expert weights", "reduce-scatter", "fsdp")
    assert step[gathered] == 1.5 * each[gathered] and step[scattered] == each[scattered]


def test_the_transport_is_the_one_that_the_model_chooses() -> None:
    run = pretrain_run("train.batch_size=64", "train.microbatches=1")
    assert microbatch_shape(run).transport == "all_to_all"
    sizes = ExchangeSizes(4096, 4096, 2, 8)
    assert bytes_received(all_to_all, sizes) < bytes_received(all_gather, sizes)
    assert (
        microbatch_shape(pretrain_run("train.batch_size=64", "train.microbatches=1", "mesh.fsdp=32", "mesh.expert=2")).transport
        == "all_gather"
    )


def test_dense_first_layers_send_no_tokens_to_experts() -> None:
    dense = ("model.num_layers=3", "model.ffn.dense_layers={count: 1, ffn_dim: 256}", "export=none")
    both = [modelled(pretrain_run(*SMALL, "mesh={expert: 8}", *changes)) for changes in ((), dense)]
    sparse, mixed = (sum(flow.bytes for flow in found if flow.what == "tokens to experts") for found in both)
    assert sparse == mixed > 0


def test_one_device_receives_nothing() -> None:
    assert modelled(pretrain_run(*SMALL, "mesh={}")) == []
    assert jax.device_count() == 8
