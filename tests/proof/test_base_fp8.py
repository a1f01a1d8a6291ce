"""The second dequantization of a base: equal for every spelling, and different where the first reader is wrong."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train.commands import write_and_prove
from moe_train.proof import base_fp8
from moe_train.proof.checks import Fault
from moe_train.weights import external
from moe_train.weights.fp8.tensor import Fp8Tensor
from tests.random_parameters import random_parameters
from tests.tiny import MIXTRAL, ONE
from tests.weights.fp8.files import COMPRESSED, HF_BLOCK, HF_TENSOR, NATIVE, quantize_folder

SPELLINGS = {
    "tensors": ("hf", HF_TENSOR, "weight_scale_inv", None),
    "blocks": ("hf", HF_BLOCK | {"weight_block_size": [5, 3]}, "weight_scale_inv", (5, 3)),
    "compressed": ("hf", COMPRESSED, "weight_scale", (4, 4)),
    "native": ("mistral", NATIVE, "qscale_weight", None),
}


@pytest.fixture(scope="module")
def unquantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unquantized")
    with jax.set_mesh(ONE):
        weights = random_parameters(MIXTRAL, "bfloat16")
        layouts: tuple[Any, ...] = ("hf", "mistral")
        for layout in layouts:
            options = write_and_prove.WriteOptions(layout=layout, dtype="bfloat16", depth="tensors")
            write_and_prove.export_model(weights, MIXTRAL, folder / layout, options)
    return folder


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_was_read_is_dequantized_alike_a_second_time(spelling: str, unquantized: Path, tmp_path: Path) -> None:
    layout, section, scale, steps = SPELLINGS[spelling]

    def name_of(name: str) -> str:
        return name.removesuffix("weight") + scale

    folder, _ = quantize_folder(unquantized / layout, tmp_path / "q", section, name_of, steps)
    base = external.open_external_weights(folder)
    names = base_fp8.quantized_names(base)
    assert names == [name for name, tensor in base.tensors.items() if isinstance(tensor, Fp8Tensor)] and len(names) == 64
    assert base_fp8.check_base(base).metrics == {"count": 64}
    tensor, another = base.tensors[names[5]], base.tensors[names[6]]
    assert isinstance(tensor, Fp8Tensor) and isinstance(another, Fp8Tensor)
    wrong = dataclasses.replace(tensor, scales=another.scales)
    with pytest.raises(Fault, match=f"{names[5]} in .* what was read is not its FP8 numbers times their scales"):
        base_fp8.check_base(base._replace(tensors={**base.tensors, names[5]: wrong}))


@pytest.mark.parametrize(
    ("scales", "shape", "block", "steps"),
    [
        ((1, 1), (8, 6), None, (8, 6)),
        ((8, 1), (8, 6), None, (1, 6)),
        ((2, 1), (200, 6), None, (100, 6)),
        ((2, 1), (200, 6), (128, 128), (128, 6)),
        ((2, 2), (200, 200), (128, 128), (128, 128)),
        ((3, 2), (300, 200), None, (128, 128)),
        ((2, 2), (100, 200), (128, 128), (50, 128)),
    ],
)
def test_how_many_numbers_share_a_scale(
    scales: tuple[int, int], shape: tuple[int, int], block: tuple[int, int] | None, steps: tuple[int, int]
) -> None:
    assert base_fp8._steps(np.ones(scales), shape, block) == steps


def test_other_files_have_no_fp8(unquantized: Path, tmp_path: Path) -> None:
    assert base_fp8.quantized_names(external.open_external_weights(unquantized / "hf")) == []
    shutil.copytree(unquantized / "hf", tmp_path / "copy")
    (tmp_path / "copy/left over.safetensors").write_bytes(b"damaged")
    assert base_fp8.quantized_names(external.open_external_weights(tmp_path / "copy")) == []
