"""FP8 files of every spelling, made of an unquantized model's folder, and what they stand for by plain formulas."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
Arrays = dict[str, np.ndarray]

HF_TENSOR: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
HF_BLOCK: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [4, 4]}
COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "FP8_BLOCK": {
            "targets": ["Linear"],
            "input_activations": {"num_bits": 8, "dynamic": True},
            "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [4, 4], "symmetric": True},
        }
    },
    "ignore": ["lm_head", "re:.*gate$"],
    "quantization_status": "compressed",
}
NATIVE: dict[str, Any] = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}


def reference(codes: np.ndarray, scales: np.ndarray, steps: tuple[int, ...], dtype: np.dtype = BF16) -> np.ndarray:
    """Dequantize by the formula: each scale is repeated over its block, and the product is rounded once."""
    whole = scales.astype(np.float32)
    for dim, step in enumerate(steps):
        whole = np.repeat(whole, step, dim)
    whole = whole[tuple(slice(size) for size in codes.shape)]
    return (codes.astype(np.float32) * whole).astype(dtype)


def quantize(w: np.ndarray, steps: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Quantize with a scale, not a round number, for each block; returns (codes, scales)."""
    shape = tuple(math.ceil(size / step) for size, step in zip(w.shape, steps, strict=True))
    scales = np.empty(shape, np.float32)
    codes = np.empty(w.shape, E4M3)
    for place in np.ndindex(shape):
        region = tuple(slice(i * step, (i + 1) * step) for i, step in zip(place, steps, strict=True))
        block = w[region].astype(np.float32)
        scales[place] = max(float(np.abs(block).max()), 1e-3) / 413.7
        codes[region] = np.clip(block / scales[place], -448, 448).astype(E4M3)
    return codes, scales


def is_linear(name: str) -> bool:
    """Whether released FP8 models quantize a tensor: linear maps of layers, without routers."""
    return "layers." in name and "norm" not in name and ".gate.weight" not in name and "mlp.gate.weight" not in name


def quantize_folder(
    source: Path,
    out: Path,
    section: dict[str, Any],
    scale_name: Callable[[str], str],
    steps: tuple[int, int] | None = None,
    activation: str | None = None,
) -> tuple[Path, Arrays]:
    """Write the model in a folder as FP8; returns the folder and what each of its tensors stands for.

    `steps` are outputs and inputs of a block, None for one scale per tensor; `activation` replaces `weight` at the end of the names
    of the scales of activations.
    """
    out.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors" and "proof" not in file.name and "index" not in file.name:
            (out / file.name).write_bytes(file.read_bytes())
    native = (out / "params.json").is_file()
    settings_file = out / ("params.json" if native else "config.json")
    key = "quantization" if native and section.get("qformat_weight") else "quantization_config"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {key: section}))
    written: Arrays = {}
    meaning: Arrays = {}
    for file in source.glob("*.safetensors"):
        for name, w in load(file).items():
            if not is_linear(name):
                written[name] = meaning[name] = w.astype(BF16)
                continue
            block = (*(1,) * (w.ndim - 2), *(steps or w.shape[-2:]))
            codes, scales = quantize(w, block)
            meaning[name] = reference(codes, scales, block)
            written[name] = codes
            written[scale_name(name)] = scales.reshape(()) if scales.size == 1 else scales
            if activation:
                written[name.removesuffix("weight") + activation] = np.ones((), np.float32)
    stem = "consolidated" if native else "model"
    save(written, out / f"{stem}.safetensors")
    return out, meaning


def load(file: Path) -> Arrays:
    """Read a safetensors file; the library's own function knows no FP8."""
    dtypes = {"F8_E4M3": E4M3, "BF16": BF16, "F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}
    arrays: Arrays = {}
    for name, entry in safetensors.deserialize(file.read_bytes()):
        arrays[name] = np.frombuffer(entry["data"], dtypes[entry["dtype"]]).reshape(entry["shape"]).copy()
    return arrays


def save(arrays: Arrays, file: Path) -> None:
    """Write a safetensors file."""
    safetensors.numpy.save_file(arrays, file, metadata={"format": "pt"})
