"""The second reader's FP8: its numbers against the library's, its bound, and damage that it finds in an export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.proof import fp8, prove
from moe_train.proof.checks import Fault
from tests.random_parameters import random_parameters
from tests.tiny import MISTRAL4, MIXTRAL, ONE
from tests.weights.fp8.files import Arrays, load, save


def test_numbers_are_those_of_the_library() -> None:
    theirs = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(fp8.NUMBERS, theirs)


def test_rounding_is_within_the_bound_and_uses_it() -> None:
    exact = np.random.default_rng(0).normal(size=(64, 64)) * np.exp(np.random.default_rng(1).normal(0, 3, (64, 64)))
    scale = np.full_like(exact, np.abs(exact).max() / fp8.LARGEST)
    codes = (exact / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    written, allowed = fp8.decode(bytearray(codes.tobytes()), scale, exact)
    share = np.abs(written - exact) / allowed
    assert 0.9 < share.max() <= 1
    next_code = bytearray((codes.view(np.uint8) ^ 1).tobytes())
    assert np.mean(np.abs(fp8.decode(next_code, scale, exact)[0] - exact) > allowed) > 0.95


def test_maxima_of_blocks_are_collected_over_chunks() -> None:
    w = np.random.default_rng(0).normal(size=(300, 200))
    whole = np.array([[np.abs(w[i : i + 128, j : j + 128]).max() for j in (0, 128)] for i in (0, 128, 256)])
    maxima = fp8.BlockMaxima(whole / fp8.LARGEST)
    for start in range(0, 300, 70):
        maxima.add(w[start : start + 70], start)
    assert maxima.fault() is None
    wrong = whole / fp8.LARGEST
    wrong[2, 1] *= 1.0001
    maxima = fp8.BlockMaxima(wrong)
    maxima.add(w, 0)
    assert "at [2, 1]" in str(maxima.fault())


@pytest.fixture(scope="module")
def weights() -> dict[str, jax.Array]:
    with jax.set_mesh(ONE):
        return random_parameters(MIXTRAL)


@pytest.fixture(scope="module")
def exported(weights: dict[str, jax.Array], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "q"
    with jax.set_mesh(ONE):
        options = write_and_prove.WriteOptions(dtype="fp8", depth="tensors")
        write_and_prove.export_model(weights, MIXTRAL, folder, options)
    return folder


W = "model.layers.1.self_attn.o_proj.weight"
S = f"{W}_scale_inv"


def next_number(arrays: Arrays) -> None:
    arrays[W].view(np.uint8)[2, 3] += 1 if arrays[W].view(np.uint8)[2, 3] & 127 < 126 else -1


def halve_scale(arrays: Arrays) -> None:
    arrays[S] = np.asarray(arrays[S] / 2)


def double_scale_exactly(arrays: Arrays) -> None:
    """The same numbers at half the size and a scale of twice it: only a few are rounded differently, but the range is wasted."""
    arrays[W] = (arrays[W].astype(np.float32) / 2).astype(arrays[W].dtype)
    arrays[S] = np.asarray(arrays[S] * 2)


DAMAGE: dict[str, tuple[Callable[[Arrays], Any], str]] = {
    "another number": (next_number, f"{W} in .* is not .*off by"),
    "half the scale": (halve_scale, f"{W} in .* is not .*off by"),
    "a wasteful scale": (double_scale_exactly, W),
    "no scale": (lambda arrays: arrays.pop(S), f"{W} is F8_E4M3, not FP8"),
    "a scale of another shape": (lambda arrays: arrays.update({S: np.ones((3, 1), np.float32)}), r"not FP8 \(and 1 more\)"),
    "not quantized": (lambda arrays: arrays.update({W: arrays[W].astype(ml_dtypes.bfloat16)}), f"{W} is BF16, not FP8"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found(damage: str, exported: Path, weights: dict[str, jax.Array], tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    folder = damaged(exported, tmp_path, change)
    with pytest.raises(Fault, match=message):
        prove.check_tensors(export_of(folder, weights), [])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (None, r"has to state quantization_config\.quant_method 'fp8'"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "weight_block_size None"),
        ({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}, "activation_scheme 'dynamic'"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, "weight_block_size None"),
    ],
)
def test_a_config_that_states_another_quantization_is_found(
    section: Any, message: str, exported: Path, weights: dict[str, jax.Array], tmp_path: Path
) -> None:
    folder = damaged(exported, tmp_path, lambda arrays: None)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": section}))
    with pytest.raises(Fault, match=message):
        prove.check_tensors(export_of(folder, weights), [])


GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


def other_scale_of_up(arrays: Arrays) -> None:
    arrays[f"{GATE_UP}_scale_inv"][2, 1] *= 1.5


def double_both_scales(arrays: Arrays) -> None:
    arrays[GATE_UP][2] = (arrays[GATE_UP][2].astype(np.float32) / 2).astype(arrays[GATE_UP].dtype)
    arrays[f"{GATE_UP}_scale_inv"][2] *= 2


def swap_gate_and_up(arrays: Arrays) -> None:
    arrays[GATE_UP][3] = np.roll(arrays[GATE_UP][3], 16, axis=0)


FUSED_DAMAGE: dict[str, tuple[Callable[[Arrays], Any], str]] = {
    "two scales": (other_scale_of_up, "off by|have to be equal"),
    "a wasteful scale": (double_both_scales, "off by|the largest magnitude of its block needs"),
    "gate for up": (swap_gate_and_up, "off by"),
    "one scale": (
        lambda arrays: arrays.update({f"{GATE_UP}_scale_inv": arrays[f"{GATE_UP}_scale_inv"][:, :1].copy()}),
        r"has scales of the shape",  # of a grid of blocks, of which this is one
    ),
}


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, jax.Array]]:
    folder = tmp_path_factory.mktemp("fused") / "q"
    with jax.set_mesh(ONE):
        arrays = random_parameters(MISTRAL4)
        options = write_and_prove.WriteOptions(dtype="fp8", depth="tensors")
        write_and_prove.export_model(arrays, MISTRAL4, folder, options)
    return folder, arrays


@pytest.mark.parametrize("damage", FUSED_DAMAGE)
def test_damage_of_fused_experts_is_found(damage: str, fused: tuple[Path, dict[str, jax.Array]], tmp_path: Path) -> None:
    exported, arrays = fused
    change, message = FUSED_DAMAGE[damage]
    folder = damaged(exported, tmp_path, change)
    with pytest.raises(Fault, match=message):
        prove.check_tensors(prove.Export(folder, "hf", "fp8", arrays, MISTRAL4, None, None, None), [])


def damaged(exported: Path, tmp_path: Path, change: Callable[[Arrays], Any]) -> Path:
    """A copy of an export with changed tensors."""
    arrays = load(exported / "model-00001-of-00001.safetensors")
    change(arrays)
    save(arrays, tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    return tmp_path


def export_of(folder: Path, weights: dict[str, jax.Array]) -> prove.Export:
    model: config.Model = MIXTRAL
    return prove.Export(folder, "hf", "fp8", weights, model, None, None, None)
