"""FLOPs against figures counted elsewhere, and what a writer leaves in its files."""

from __future__ import annotations

import json
import math
import struct
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from moe_train import config, metrics
from moe_train.model.moe import RouterStats
from moe_train.model.transformer import init_model, parameters


def mixtral(vocab_size: int, model_dim: int, num_layers: int, head_dim: int, ffn_dim: int) -> config.Model:
    return config.Model(
        family="mixtral",
        vocab_size=vocab_size,
        model_dim=model_dim,
        num_layers=num_layers,
        attention=config.Attention(num_heads=8, num_kv_heads=4, head_dim=head_dim),
        ffn=config.MoeFfn(name="moe", ffn_dim=ffn_dim, num_experts=8, experts_per_token=2),
    )


S = mixtral(vocab_size=8192, model_dim=256, num_layers=4, head_dim=32, ffn_dim=896)
M = mixtral(vocab_size=32000, model_dim=512, num_layers=8, head_dim=64, ffn_dim=1792)


@pytest.mark.parametrize(("model", "batch_size", "gflop"), [(S, 8, 219.2), (M, 4, 846.0)], ids=["S", "M"])
def test_flops_of_a_step(model, batch_size, gflop):
    """Figures of another program, which counts one step of transformers' Mixtral of the same sizes."""
    step = metrics.flops_per_token(model, 512) * batch_size * 512
    assert round(step / 1e9, 1) == gflop


def test_flops_of_dense_windowed_layers():
    """By hand: 6 per weight but the embedding's, and 12 * N * H per visible key."""
    attention = config.Attention(num_heads=2, num_kv_heads=1, head_dim=4, windows=(None, 8))
    ffn = config.DenseFfn(name="dense", ffn_dim=16)
    model = config.Model(family="ministral", vocab_size=10, model_dim=8, num_layers=2, attention=attention, ffn=ffn)
    weights = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 10 * 8
    keys = 32 / 2 + (8 - 8 * 8 / 64)  # 16 on average without a window; 7 with: 1, 2, … 8, then 8
    assert metrics.flops_per_token(model, 32) == 6 * weights + 12 * 2 * 4 * keys
    assert np.mean([min(t + 0.5, 8) for t in range(32)]) == pytest.approx(7, abs=0.01)


def test_flops_with_adapters():
    """Frozen weights cost 4, adapters 6, an expert's adapter only where a token meets it."""
    lora = config.Lora(targets=(config.LoraTarget(modules=("*",), rank=16, alpha=16.0),))
    with jax.set_mesh(jax.make_mesh((1,) * 5, ("data", "fsdp", "expert", "context", "tensor"), devices=jax.devices()[:1])):
        shapes = parameters(jax.eval_shape(lambda: init_model(0, S, config.Compute(), lora)))[1]
    adapters = {path: x for path, x in shapes.items() if path.endswith(("lora_a", "lora_b"))}
    D, F, NH, KH = 256, 896, 256, 128
    beside = 4 * 16 * ((D + NH) * 2 + (D + KH) * 2 + 2 * 3 * (D + F))
    pairs = 3 * 4 * 4 * NH * 256
    full = metrics.flops_per_token(S, 512)
    assert metrics.flops_per_token(S, 512, adapters) == pytest.approx((full - pairs) * 4 / 6 + pairs + 6 * beside, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v6 lite", 918), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756)],
)
def test_peak_of_known_chips(kind, teraflops):
    device = SimpleNamespace(platform="tpu", device_kind=kind, process_index=0)
    assert metrics.peak_flops([device] * 4)[0] == 4 * teraflops * 1e12


def test_peak_of_an_unknown_chip_is_not_invented():
    assert metrics.peak_flops([SimpleNamespace(platform="gpu", device_kind="Abacus 9", process_index=0)]) == (
        None,
        "no figure for Abacus 9",
    )


def test_peak_of_a_cpu_is_measured_once_for_its_fake_devices(monkeypatch):
    monkeypatch.setattr(metrics, "measured_matmul_flops", lambda: 1e11)
    assert metrics.peak_flops(jax.devices())[0] == 1e11


def test_measured_product():
    assert 1e8 < metrics.measured_matmul_flops(128) < 1e14


def test_router_figures_stay_per_layer():
    chosen = np.array([[2, 2, 2, 2], [4, 4, 0, 0]])
    ones = np.ones(2)
    found = metrics.router_figures(RouterStats(chosen, ones, ones, np.array([math.log(4), 0.1]), np.array([0, 3])))
    assert found["dead_experts"] == [0.0, 0.5]
    assert found["balance"] == 2.0 and found["dropped"] == [0, 3]
    assert found["router_entropy"] == [pytest.approx(math.log(4), abs=1e-5), 0.1]
    assert [sum(row) for row in found["load"]] == [1.0, 1.0]


FIGURES = {"loss": 2.5, "tokens_per_second": 1234.0, "mfu": 0.25, "balance": 1.5, "skipped": 0, "load": [[0.75, 0.25]]}


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_lines_files_and_events(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "LINE_SECONDS", 0)
    writer = metrics.Writer(tmp_path, config.Metrics(), start_step=0, total_steps=4)
    for step in (1, 2):
        writer.train(step, FIGURES)
    writer.evaluation(2, {"loss": 2.25, "loss_tokens": 1000})
    writer.close()
    assert [(line["kind"], line["step"], line["loss"]) for line in lines(tmp_path)] == [
        ("train", 1, 2.5),
        ("train", 2, 2.5),
        ("eval", 2, 2.25),
    ]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "step 1/4  loss 2.5000  1,234 tokens/s  MFU 25.0%  balance 1.50"
    assert said[1].startswith(said[0].replace("1/4", "2/4")) and said[1].endswith(" left")
    assert said[2] == "step 2/4  held-out loss 2.2500 over 1,000 tokens"
    values = {(tag, step): value for tag, step, value in tensorboard_values(tmp_path)}
    assert values["train/loss", 1] == values["train/loss", 2] == 2.5
    assert values["train/load/layer_0/expert_1", 2] == 0.25
    assert values["eval/loss", 2] == 2.25


def tensorboard_values(run_dir):
    """Records of an event file: length (8 bytes), its checksum (4), the message, its checksum (4)."""
    for file in sorted((run_dir / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            yield from ((value.tag, event.step, value.simple_value) for value in event.summary.value)
            content = content[16 + length :]


def test_steps_that_are_done_again_are_written_once(tmp_path):
    """A process died after step 4, without a checkpoint since step 2, in the middle of a line."""
    settings = config.Metrics(tensorboard=False)
    writer = metrics.Writer(tmp_path, settings, start_step=0, total_steps=6)
    for step in (1, 2, 3, 4):
        writer.train(step, FIGURES)
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    writer = metrics.Writer(tmp_path, settings, start_step=2, total_steps=6)
    writer.train(3, FIGURES)
    writer.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert not (tmp_path / "tensorboard").exists()


def test_a_log_gets_a_line_now_and_then(tmp_path, capsys):
    with metrics.Writer(tmp_path, config.Metrics(tensorboard=False), start_step=0, total_steps=50) as writer:
        for step in range(1, 51):
            writer.train(step, FIGURES)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["1/50", "50/50"]
    assert len(lines(tmp_path)) == 50


def test_other_processes_write_nothing(tmp_path):
    writer = metrics.Writer(tmp_path, config.Metrics(), start_step=0, total_steps=4, write=False)
    writer.train(1, FIGURES)
    writer.evaluation(1, {"loss": 1.0, "loss_tokens": 1})
    writer.say("hello")
    writer.close()
    assert not list(tmp_path.iterdir())


def test_a_terminal_gets_one_progress_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    writer = metrics.Writer(tmp_path, config.Metrics(tensorboard=False), start_step=0, total_steps=4)
    for step in range(1, 5):
        writer.train(step, FIGURES)
    writer.close()
    shown = capsys.readouterr().err
    for part in ("loss 2.5000", "1,234 tokens/s", "MFU 25.0%", "balance 1.50", "4/4"):
        assert part in shown
