"""The FP8 weights of a base, dequantized a second time: the weights of an export are what the first reader made of them.

Nothing here comes from `weights.fp8`: names of scales, blocks and numbers are stated again, so that a mistake there is found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_train.machine.files import read_object
from moe_train.proof import fp8, reread
from moe_train.proof.checks import Fault, Finding, first_and_count
from moe_train.proof.reread import SCALE_BLOCK, Stored
from moe_train.weights.on_disk import WeightFiles

_ROWS_BYTES = 2**20
"""Bytes of a file that are compared at once."""
_SECTIONS = ("quantization_config", "quantization")
_BLOCK_KEYS = ("weight_block_size", "block_structure")


def _read_headers(base: WeightFiles) -> dict[str, Stored]:
    """Read the headers of the files that a base consists of, which need not be all that are in its folder."""
    if not base.path.is_dir():  # a GGUF file
        return {}
    stem = "consolidated" if any(name.endswith("tok_embeddings.weight") for name in base.tensors) else "model"
    index = base.path / f"{stem}.safetensors.index.json"
    files = {f"{stem}.safetensors"}
    if index.is_file():
        files = set(read_object(index)["weight_map"].values())
    return reread.tensors_of_files([base.path / file for file in sorted(files) if (base.path / file).is_file()])


def quantized_names(base: WeightFiles) -> list[str]:
    """Return the names of the FP8 tensors of a base."""
    stored = _read_headers(base)
    return [name for name in base.tensors if name in stored and stored[name].kind == "F8_E4M3"]


def check_base(base: WeightFiles) -> Finding:
    """Compare what was read of a base's FP8 tensors with a second dequantization, bit for bit.

    Raises:
        Fault: a number differs.
    """
    stored = _read_headers(base)
    names = quantized_names(base)
    block = stated_block(base.path)
    with ThreadPoolExecutor() as pool:
        faults = [fault for fault in pool.map(partial(_compare, base, stored, block), names) if fault]
    if faults:
        raise Fault(first_and_count(faults))
    return Finding(
        f"{len(names):,} FP8 tensors of the base, dequantized a second time, have the bits that were read", {"count": len(names)}
    )


def _compare(base: WeightFiles, stored: Mapping[str, Stored], block: tuple[int, int] | None, name: str) -> str | None:
    """Compare one tensor; returns what is wrong, or None."""
    read = base.tensors[name]
    for index, values in dequantize(stored, name, block):
        if read.read(index).tobytes() != values.astype(read.dtype).tobytes():
            return f"{name} in {stored[name].file.name}: what was read is not its FP8 numbers times their scales"
    return None


def dequantize(
    stored: Mapping[str, Stored], name: str, block: tuple[int, int] | None
) -> Iterator[tuple[tuple[int | slice, ...], np.ndarray]]:
    """Yield the numbers of an FP8 tensor in float32, about a MiB of the file at a time, with their place in the tensor.

    Args:
        stored: the tensors of the files, scales among them.
        name: the tensor.
        block: outputs and inputs of a block, where a config states them.
    """
    tensor = stored[name]
    *lead, outputs, inputs = tensor.shape
    with tensor.file.open("rb") as file:
        for e, scales_of_matrix in enumerate(_scales(stored, name, tensor.shape)):
            steps = _steps(scales_of_matrix, (outputs, inputs), block)
            for start in range(0, outputs, max(1, _ROWS_BYTES // inputs)):
                stop = min(start + max(1, _ROWS_BYTES // inputs), outputs)
                codes = np.frombuffer(tensor.read(file.fileno(), e * outputs + start, e * outputs + stop), np.uint8)
                of_rows = scales_of_matrix[np.arange(start, stop) // steps[0]]
                values = fp8.NUMBERS[codes].astype(np.float32).reshape(-1, inputs) * of_rows[:, np.arange(inputs) // steps[1]]
                yield ((e, slice(start, stop)) if lead else (slice(start, stop),)), values


def _scales(stored: Mapping[str, Stored], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Read the scales of a tensor as (matrices, scales along outputs, scales along inputs) in float32."""
    stem = name.removesuffix("weight")
    candidates = [f"{stem}qscale_weight", f"{name}_scale_inv", f"{name}_scale"]
    (found,) = (stored[candidate] for candidate in candidates if candidate in stored)
    with found.file.open("rb") as file:
        raw = found.read(file.fileno(), 0, found.rows)
    scales = np.frombuffer(raw, reread.FLOAT_DTYPES[found.kind]).astype(np.float32)
    matrices = shape[0] if len(shape) == 3 else 1
    if scales.size == 1:
        return np.broadcast_to(scales, (matrices, 1, 1))
    # Dims of size 1 may be missing at the end.
    dims = [*(found.shape if len(shape) == 3 else (1, *found.shape)), 1, 1][:3]
    return scales.reshape(dims)


def _steps(scales: np.ndarray, shape: tuple[int, int], stated: tuple[int, int] | None) -> tuple[int, int]:
    """Return how many outputs and inputs share a scale."""
    outputs, inputs = scales.shape
    rows, columns = stated or (SCALE_BLOCK, SCALE_BLOCK)
    if inputs == 1:
        columns = shape[1]
    if outputs in (1, shape[0]):
        return shape[0] // outputs, columns
    if outputs == 2 and (stated is None or -(-shape[0] // rows) != 2):
        return shape[0] // 2, columns  # gate and up of a fused tensor
    return rows, columns


def stated_block(directory: Path) -> tuple[int, int] | None:
    """Return the block that a config states anywhere in its section of the quantization; None without one."""
    for name in ("config.json", "params.json"):
        if not (directory / name).is_file():
            continue
        fields = read_object(directory / name)
        for level in (fields, fields.get("text_config") or {}):
            for key in _SECTIONS:
                for block in _blocks_in(level.get(key)):
                    return block
    return None


def _blocks_in(section: Any) -> Iterator[tuple[int, int]]:
    """Yield the blocks that a section states, at any depth."""
    if not isinstance(section, dict):
        return
    for key, value in section.items():
        if key in _BLOCK_KEYS and isinstance(value, list):
            yield value[0], value[1]
        yield from _blocks_in(value)
