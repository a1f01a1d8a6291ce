"""The memory model for GPUs: what differs from TPUs, and (slow) against XLA:GPU, which needs JAX's CUDA plugin but no GPU."""

from __future__ import annotations

import importlib.util

import pytest

from moe_train import config
from moe_train.config import yaml_file
from moe_train.machine.mesh import mesh_sizes
from moe_train.plan.memory import Memory, memory
from moe_train.plan.topology import parse_topology
from moe_train.plan.weights import layout
from tests.plan.pretraining import PRETRAIN, pretrain_run
from tests.plan.test_memory import within

SMALL = ("model.num_layers=2", "model.model_dim=64", "model.ffn.ffn_dim=128", "model.vocab_size=256", "train.seq_len=128")
SMALL += ("model.attention={num_heads: 8, num_kv_heads: 2, head_dim: 16}", "train.batch_size=8", "train.microbatches=1")
SMALL += ("mesh.fsdp=2", "mesh.expert=4", "compute.param_dtype=bfloat16")
LORA = "lora={targets: [{modules: ['attention.*', 'ffn.*'], rank: 4, alpha: 8}]}"
NF4 = "lora={targets: [{modules: ['attention.*', 'ffn.*'], rank: 4, alpha: 8}], quantize: {name: nf4, block_size: 16}}"


def on_gpu(*overrides: str) -> Memory:
    run = pretrain_run(*SMALL, *overrides)
    return memory(run, layout(run), "gpu")


def test_adapters_are_not_padded() -> None:
    run = pretrain_run(*SMALL, LORA, "loss={}")
    laid = layout(run)
    sizes = {"data": 1, "fsdp": 2, "expert": 4, "context": 1, "tensor": 1}
    assert on_gpu(LORA, "loss={}").gradients == sum(w.stored_bytes(sizes) for w in laid.weights if w.trainable)
    assert memory(run, laid).gradients > on_gpu(LORA, "loss={}").gradients


def test_the_attention_is_computed_again() -> None:
    minimal = on_gpu("compute.remat=minimal").saved
    run = pretrain_run(*SMALL, "compute.remat=minimal")
    # In 2 layers, for 128 tokens: 8 heads of 16 outputs in two bytes, and a log-sum-exp in four.
    assert memory(run, layout(run)).saved - minimal == 2 * 128 * 8 * (16 * 2 + 4)


def test_frozen_experts_have_no_gradients_and_quantized_ones_are_there_one_matrix_at_a_time() -> None:
    matrices = 3 * 2 * 64 * 128 * 2  # of the two experts of a device, in bytes
    trained, frozen, quantized = (on_gpu(*more, "compute.remat=full").layer for more in ((), (LORA, "loss={}"), (NF4, "loss={}")))
    assert frozen - quantized == matrices * 4 // 3 - matrices // 3
    assert trained >= frozen


PROGRAMS = {
    "adapters": ("mistral_small4_lora_h100x8", "h100x8", "model.preset=mistral-small-4", "model.num_layers=4",
        "train.batch_size=16"),
    "nf4": ("mixtral_8x7b_qlora_h100x1", "h100x1", "model.preset=mixtral-8x7b", "model.num_layers=4"),
    "dense": ("mistral_7b_full_finetune_h100x8", "h100x8", "model.preset=mistral-7b", "model.num_layers=8"),
    "dense, full": ("mistral_7b_lora_h100x8", "h100x8", "model.preset=mistral-7b", "compute.remat=full"),
    "experts": ("mixtral_8x7b_pretrain_v5p", "h100x8", "model.num_layers=4", "mesh={fsdp: 8}", "train.batch_size=8",
        "train.microbatches=1", "compute.remat=full"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="JAX's CUDA plugin is not here; run: bash launch/install.sh cuda"
)
@pytest.mark.parametrize("case", PROGRAMS.values(), ids=PROGRAMS)
def test_programs_take_what_the_compiler_says(case: tuple[str, ...]) -> None:
    """A minute each."""
    recipe, topology, *overrides = case
    place = parse_topology(topology)
    written = yaml_file.load_config(PRETRAIN.replace("mixtral_8x7b_pretrain_v5p", recipe), overrides)
    resolved = written.model_copy(update={"mesh": mesh_sizes(written.mesh, place.num_devices)})
    within(0.05, config.run_of(resolved), topology)
