"""Runs whose frozen weights are held in few bits: from files and from a run, resumed, evaluated, merged."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.checkpoint import load_params, model_dir, runs
from moe_train.checkpoint.arrays import StoredPart
from moe_train.commands.evaluate import evaluate_model
from moe_train.commands.export import export
from moe_train.commands.generate import generate_text
from moe_train.commands.train import train
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import Parameters, parameters
from moe_train.model.quantize import quantize_like
from moe_train.model.transformer import abstract_model
from moe_train.run import loop
from moe_train.run.writer import Writer
from moe_train.weights import external

TARGETS = [{"modules": ["attention.*", "ffn.*"], "rank": 2, "alpha": 4.0}]
MOE = {
    "family": "mixtral",
    "vocab_size": 288,
    "model_dim": 32,
    "num_layers": 2,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "ffn": {"name": "moe", "ffn_dim": 48, "num_experts": 4, "experts_per_token": 2},
    "max_seq_len": 64,
    "init_stddev": 0.1,
}
ON = {"fsdp": 2, "expert": 2, "tensor": 2}


def held_out(run_dir: Path) -> list[float]:
    said = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in said if line["kind"] == "eval"]


def shapes_of(run: config.Run, how: Any = None) -> dict[str, Any]:
    lora = run.lora and run.lora.model_copy(update={"quantize": how})
    return parameters(abstract_model(run.model, run.compute, lora))[1]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(small_run: Callable[..., config.Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Mixtral as a run (`run`) and as files (`hf`)."""
    folder = tmp_path_factory.mktemp("base")
    zero = {"load_balance_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    assert train(small_run(folder / "run", model=MOE, mesh=ON, loss=zero, train__steps=2)) == loop.FINISHED
    export(folder / "run", folder / "hf")
    return folder


@pytest.fixture(scope="module")
def qlora(
    base: Path, small_run: Callable[..., config.Config], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., config.Config]:
    def make(run_dir: Path, source: str, how: str, **changes: Any) -> config.Config:
        lora = {"targets": TARGETS, "quantize": {"name": how, "block_size": 8}}
        common: dict[str, Any] = {"model": None, "mesh": ON, "lora": lora, "train__steps": 4, "data__tokenizer": None}
        return small_run(run_dir, init_from=str(base / source), **(common | changes))

    return make


@pytest.fixture(scope="module")
def whole(qlora: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run beside nf4 that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("qlora") / "run"
    assert train(qlora(run_dir, "hf", "nf4")) == loop.FINISHED
    return run_dir


@pytest.mark.parametrize(("source", "how"), [("hf", "nf4"), pytest.param("run", "int8", marks=pytest.mark.slow)])
def test_a_run_beside_quantised_weights(
    base: Path, qlora: Any, whole: Path, text: Path, tmp_path: Path, source: str, how: str
) -> None:
    run_dir = whole if source == "hf" else tmp_path / "run"
    assert source == "hf" or train(qlora(run_dir, source, how)) == loop.FINISHED
    losses = held_out(run_dir)
    assert losses[-1] < losses[0] - 0.01
    # a checkpoint holds adapters alone, and what was read again is what the run had
    saved = {path.name for path in (run_dir / "checkpoints/4/params").rglob("*")}
    assert not any("codes" in name or "scales" in name or "weight" in name for name in saved)
    assert evaluate_model(run_dir, [text / "eval.jsonl"])["loss"] == pytest.approx(losses[-1], rel=1e-5)
    assert len(generate_text(run_dir, ["able"], 3)) == 1

    # weights are those of the base, each quantised as it was read
    run = runs.read_run(run_dir)
    with jax.set_mesh(make_mesh(run.mesh)):
        held = model_dir.load_parameters(run_dir, shapes_of(run, run.lora.quantize))
        plain = {p: x for p, x in shapes_of(run).items() if "lora" not in p}
        full = model_dir.load_parameters(base / source, plain)
        names = [path for path in held if path.endswith(".codes")]
        assert len(names) == 7
        wanted = quantize_like(dict(full), {p: x for p, x in shapes_of(run, run.lora.quantize).items() if "lora" not in p})
        for path, x in wanted.items():
            np.testing.assert_array_equal(np.asarray(held[path]), np.asarray(x), err_msg=path)


def test_a_run_is_held_in_few_bits_array_by_array(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, read, restored = runs.read_run(base / "run"), load_params.read_in_parts, []

    def noting(params: Path, path: str, like: jax.ShapeDtypeStruct) -> Iterator[StoredPart]:
        restored.append(path)
        return read(params, path, like)

    lora = config.Lora.model_validate_json(json.dumps({"targets": TARGETS}))
    with jax.set_mesh(make_mesh(run.mesh)):
        few_bits, whole = (
            {path: x for path, x in shapes_of(run.model_copy(update={"lora": lora}), how).items() if "lora" not in path}
            for how in (config.Nf4(name="nf4", block_size=8), None)
        )
        wanted = quantize_like(dict(model_dir.load_parameters(base / "run", whole)), few_bits)
        monkeypatch.setattr(load_params, "read_in_parts", noting)
        held = model_dir.load_parameters(base / "run", few_bits)
    assert held.keys() == few_bits.keys() == wanted.keys()
    assert sorted(restored) == sorted(whole)  # never two arrays that are not in few bits yet
    for path, x in wanted.items():
        np.testing.assert_array_equal(np.asarray(held[path]), np.asarray(x), err_msg=path)


def test_merged_into_the_weights_before_they_were_quantised(
    base: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "moe_train"):
        export(whole, tmp_path / "merged", merge=True)
    assert f"(nf4) during training; adapters are merged into the unquantized weights of {base / 'hf'}" in caplog.text
    run = runs.read_run(whole)
    with jax.set_mesh(make_mesh(run.mesh)):
        shapes = shapes_of(run)
        adapters = model_dir.load_parameters(whole, shapes)
        plain = {p: x for p, x in shapes.items() if "lora" not in p}
        before, after = (external.load_external_parameters(path, plain) for path in (base / "hf", tmp_path / "merged"))
        for path, x in before.items():
            wanted = np.asarray(x, np.float64)
            if path.endswith("ffn.up_proj.weight"):
                a, b = (np.asarray(adapters[path.replace("weight", name)], np.float64) for name in ("lora_a", "lora_b"))
                wanted = wanted + 2.0 * a @ b
                assert np.abs(np.asarray(after[path]) - np.asarray(x)).max() > 1e-4
                np.testing.assert_allclose(np.asarray(after[path]), wanted, rtol=1e-6, atol=1e-7)
            elif "proj" not in path:
                np.testing.assert_array_equal(np.asarray(after[path]), np.asarray(x))


def test_interrupted_and_started_again_is_the_run_undisturbed(
    qlora: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Writer.train

    def interrupt(writer: Any, step: int, figures: dict[str, Any]) -> None:
        write(writer, step, figures)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "train", interrupt)
        assert train(qlora(tmp_path / "parts", "hf", "nf4")) == loop.UNFINISHED
    assert train(qlora(tmp_path / "parts", "hf", "nf4")) == loop.FINISHED
    with pytest.raises(ValueError, match=r"lora.quantize.* was started with"):
        train(qlora(tmp_path / "parts", "hf", "int8", train__steps=5))
    run = runs.read_run(whole)
    with jax.set_mesh(make_mesh(run.mesh)):
        adapters = {p: x for p, x in shapes_of(run).items() if "lora" in p}

        def trained(run_dir: Path) -> Parameters:
            return load_params.load_params(run_dir, adapters).params

        for path, x in trained(whole).items():
            np.testing.assert_array_equal(np.asarray(x), np.asarray(trained(tmp_path / "parts")[path]), err_msg=path)
