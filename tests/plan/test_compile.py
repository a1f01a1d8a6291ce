"""Compiling for hardware that is not present: a missing compiler, and (slow) what the compilers of TPU and GPU answer."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from moe_train import config
from moe_train.plan import compile as compiler
from moe_train.plan import gpu_targets
from moe_train.plan.compile import compile_config
from moe_train.plan.topology import parse_topology
from tests.plan.pretraining import pretrain_run

SMALL = ("model.num_layers=2", "model.model_dim=1024", "model.ffn.ffn_dim=2048", "model.vocab_size=1024", "train.seq_len=1024")
SMALL += ("model.attention.num_heads=8", "model.attention.num_kv_heads=2", "train.batch_size=8", "train.microbatches=1")
SMALL += ("mesh.fsdp=4", "mesh.expert=2")
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
HAS_CUDA = importlib.util.find_spec("jax_cuda12_plugin") is not None


def small(*overrides: str) -> config.Run:
    return pretrain_run(*SMALL, *overrides)


@pytest.mark.parametrize(("topology", "extra"), [("v5p:2x2x2", "tpu"), ("h100x8", "cuda")])
def test_a_compiler_that_is_not_installed_is_named_with_its_extra(
    topology: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    missing = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in missing else find(name, *more))
    with pytest.raises(ValueError, match=rf"compiling for {topology} needs .* bash launch/install.sh {extra}, or .* --no-compile"):
        compile_config(small(), parse_topology(topology))


def test_cudnn_that_is_not_installed_is_named_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_without_cudnn(*_: Any) -> Any:
        raise RuntimeError("cuDNN not found.")

    monkeypatch.setattr(compiler, "devices_of", lambda _: [])
    monkeypatch.setattr(compiler, "make_mesh", lambda *_: None)
    monkeypatch.setattr(compiler, "compile_on", compile_without_cudnn)
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"run": small().model_dump(mode="json"), "topology": "h100x8"}))
    assert "cuDNN, which is not installed" in compiler._compile_request(request)["error"]


def test_adapters_and_weights_in_few_bits_are_in_the_state() -> None:
    """The same abstract arrays as `train` would hold: frozen weights are an argument, and have no moments."""
    lora = "lora={targets: [{modules: ['attention.*', 'ffn.*'], rank: 4, alpha: 8}], quantize: {name: nf4}}"
    run = small(lora, "compute.param_dtype=bfloat16", "loss={}")
    mesh = compiler.make_mesh(run.mesh)
    with jax.set_mesh(mesh):
        _, state, batch, _ = compiler.abstract_step(run, mesh)
    sizes = {name: sum(x.size for x in jax.tree.leaves(getattr(state, name))) for name in ("trainable", "frozen", "opt_state")}
    assert all(".lora_" in path for path in state.trainable)
    assert sizes["opt_state"] == pytest.approx(2 * sizes["trainable"], rel=1e-3)
    assert any(x.dtype == "uint8" for x in jax.tree.leaves(state.frozen))
    assert all(x.sharding.mesh == mesh for x in jax.tree.leaves((state, batch)))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not here; run: bash launch/install.sh tpu")
def test_a_slice_sends_16_bit_numbers() -> None:
    compiled = compile_config(small(), parse_topology("v5p:2x2x2"))
    assert not compiled.warnings  # of a rematerialisation that nobody asked for
    assert sum(t.bytes for t in compiled.traffic if t.dtype == "f32") < 0.01 * compiled.network_bytes
    assert compiled.bytes_per_device < 2**29


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not here; run: bash launch/install.sh tpu")
def test_several_slices_send_gradients_once_over_the_slow_network() -> None:
    run = small("train.batch_size=16", "mesh.data=2")
    compiled = compile_config(run, parse_topology("2xv5p:2x2x2"))
    crossing = [t for t in compiled.traffic if t.crosses_slices]
    assert crossing and all("data" in t.axes for t in crossing)
    assert not compiled.warnings
    assert 0 < compiled.bytes_per_device < 2**30


@pytest.mark.slow
@pytest.mark.skipif(not HAS_CUDA, reason="JAX's CUDA plugin is not here; run: bash launch/install.sh cuda")
@pytest.mark.parametrize("gpu", gpu_targets.GPU_TARGETS)
def test_gpus_that_are_not_here(gpu: str) -> None:
    compiled = compile_config(small(), parse_topology(f"{gpu}x8"))
    assert {"all-gather", "reduce-scatter"} <= {t.kind for t in compiled.traffic}
    assert "cudnn$fmha" in compiled.hlo
