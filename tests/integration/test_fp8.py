"""From an FP8 base to FP8 files by the commands: trained on, evaluated, merged, exported, verified, and refused when damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.commands.adapters import merge_into
from moe_train.commands.evaluate import evaluate_model
from moe_train.commands.export import ExportOptions, export
from moe_train.commands.inspect import inspect
from moe_train.commands.train import train
from moe_train.commands.verify import verify
from moe_train.data.tokenizers.load import load_tokenizer
from moe_train.run import loop
from moe_train.weights import external
from moe_train.weights.texts import Texts
from tests.integration.test_qlora import MOE, ON, TARGETS
from tests.random_parameters import random_parameters
from tests.tiny import ONE
from tests.weights.fp8.files import HF_BLOCK, load, quantize_folder, save

BLOCKS = HF_BLOCK | {"weight_block_size": [16, 16]}


@pytest.fixture(scope="module")
def base(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral in FP8 files with blocks, and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    model = config.Model.model_validate_json(json.dumps(MOE))
    tokenizer = load_tokenizer(config.HuggingFaceTokenizer(name="huggingface", path=str(text / "tokenizer")))
    options = write_and_prove.WriteOptions(dtype="bfloat16", texts=Texts(tokenizer), depth="tensors")
    with jax.set_mesh(ONE):
        write_and_prove.export_model(random_parameters(model, "bfloat16"), model, folder / "plain", options)
    quantize_folder(folder / "plain", folder / "fp8", BLOCKS, lambda name: f"{name}_scale_inv", (16, 16), "activation_scale")
    return folder / "fp8"


@pytest.fixture(scope="module")
def run(base: Path, small_run: Callable[..., config.Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run next to the base's own FP8 values."""
    run_dir = tmp_path_factory.mktemp("lora") / "run"
    assert train(of_base(base, small_run, run_dir)) == loop.FINISHED
    return run_dir


def of_base(base: Path, small_run: Callable[..., config.Config], run_dir: Path, **more: Any) -> config.Config:
    lora = {"targets": TARGETS, "quantize": {"name": "fp8", "block_size": 8}}
    settings: dict[str, Any] = {"model": None, "mesh": ON, "lora": lora, "train__steps": 3, "data__tokenizer": None}
    return small_run(run_dir, init_from=str(base), **(settings | more))


def passed(record: dict[str, Any]) -> dict[str, Any]:
    return {check["name"]: check["passed"] for check in record["checks"]}


@pytest.mark.slow
def test_a_run_on_an_fp8_base(run: Path, base: Path, text: Path) -> None:
    losses = [line["loss"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["kind"] == "eval"]
    assert losses[-1] < losses[0]
    assert evaluate_model(run, [text / "eval.jsonl"])["loss"] == pytest.approx(losses[-1], rel=1e-5)
    assert evaluate_model(base, [text / "eval.jsonl"])["loss"] == pytest.approx(losses[0], rel=1e-3)


def test_parameters_of_a_run_on_an_fp8_base(base: Path, small_run: Callable[..., config.Config], tmp_path: Path) -> None:
    report = inspect(of_base(base, small_run, tmp_path / "unused"))
    codes = [row for row in report.parameters if row["path"].endswith(".codes")]
    assert len(codes) == 7 and all(row["dtype"] == "int8" for row in codes)


@pytest.mark.slow
def test_exports_of_a_run_on_an_fp8_base(run: Path, base: Path, tmp_path: Path) -> None:
    layouts: tuple[Any, ...] = ("hf", "mistral")
    for layout in layouts:
        record = export(run, tmp_path / layout, layout, merge=True)
        assert record["dtype"] == "bfloat16" and passed(record)["merge"] and passed(record)["answers"]
        assert external.open_external_weights(tmp_path / layout).dtype == "bfloat16"
        options = ExportOptions(dtype="fp8")
        record = export(run, tmp_path / f"{layout}-fp8", layout, merge=True, options=options)
        assert passed(record)["merge"] and passed(record)["tensors"]
        for suffix in ("", "-fp8"):
            _, checks = verify(tmp_path / f"{layout}{suffix}", run=run)
            assert all(check.passed is not False for check in checks)
            _, checks = verify(tmp_path / f"{layout}{suffix}", base=base)
            assert all(check.passed is not False for check in checks)
    export(run, tmp_path / "peft", "peft")
    record = merge_into(base, tmp_path / "peft", tmp_path / "merged")
    assert record["dtype"] == "bfloat16" and passed(record)["merge"]
    ours, theirs = (load(tmp_path / folder / "model-00001-of-00001.safetensors") for folder in ("merged", "hf"))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], name)


def test_a_damaged_base_is_refused_in_one_line(base: Path, small_run: Callable[..., config.Config], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(base, damaged)
    arrays = load(damaged / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj.weight"
    arrays[f"{name}_scale_inv"][0, 1] = 0
    save(arrays, damaged / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name}_scale_inv\[0, 1\] is 0, but a scale has to be") as refused:
        train(of_base(damaged, small_run, tmp_path / "run"))
    assert "\n" not in str(refused.value)
