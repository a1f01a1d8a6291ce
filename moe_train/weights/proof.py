"""An export is read back and compared with the weights in memory before anybody is told that it succeeded.

Independent of the writer: the files are opened by the safetensors library, the tensors come back through the way
that reads other people's models, and deltas are worked out anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_train import config
from moe_train.weights import names, safetensors_io
from moe_train.weights.arrays import fetch
from moe_train.weights.hf_config import read_model_config
from moe_train.weights.merge import scale_of


def check(
    directory: Path, parameters: Mapping[str, jax.Array], model: config.Model, lora: config.Lora | None, dtype: np.dtype
) -> dict[str, Any]:
    """Compare a model's directory with `parameters`: untouched weights bit for bit, merged ones (where `lora` is
    given) within one unit in the last place of `dtype`.

    Returns what was found: tensors, parameters, bytes, and with adapters the matrices merged, how many of them have
    a delta of zero, and delta_kept, the share of the wanted change that survived the rounding (1 is all of it).
    Raises RuntimeError at the first difference, naming the tensor.
    """
    if (found := read_model_config(directory)) != model:
        raise RuntimeError(f"{directory / 'config.json'} was written as a different model: {found}")
    tensors = safetensors_io.open_model(directory)
    table = names.pieces(model, names.hugging_face_of(tensors))
    weights = {path: array for path, array in parameters.items() if not path.endswith((".lora_a", ".lora_b"))}
    names.check(
        directory,
        table,
        {name: tensor.shape for name, tensor in tensors.items()},
        {path: array.shape for path, array in weights.items()},
    )
    merged = zero = 0
    wanted = kept = 0.0
    for piece in table:
        if tensors[piece.name].dtype != dtype:
            raise RuntimeError(f"{piece.name} was written as {tensors[piece.name].dtype}, not {dtype}")
        written = piece.from_file(tensors[piece.name].read)
        base = fetch(weights[piece.path], piece.lead)
        module = piece.path.removesuffix(".weight")
        if lora is None or f"{module}.lora_a" not in parameters:
            same = np.array_equal(_bits(written), _bits(base.astype(dtype)))
            if not same:
                raise RuntimeError(f"{piece.name} in the file is not {piece.path}{list(piece.lead)} in memory")
            continue
        a, b = (fetch(parameters[f"{module}.{name}"], piece.lead) for name in ("lora_a", "lora_b"))
        J = b.shape[0]
        change = scale_of(lora, module) * (a.reshape(-1, J).astype(np.float64) @ b.reshape(J, -1).astype(np.float64))
        expected = base.reshape(change.shape).astype(np.float64) + change
        written = written.reshape(change.shape)
        off = np.abs(written.astype(np.float64) - expected)
        if not np.all(off <= _unit(expected, dtype)):
            raise RuntimeError(
                f"{piece.name} in the file is not {piece.path}{list(piece.lead)} with its adapter: off by {off.max():.3g}"
            )
        merged += 1
        zero += not change.any()
        wanted += float(np.vdot(change, change))
        kept += float(np.vdot(change, written.astype(np.float64) - base.reshape(change.shape).astype(np.float64)))
    sizes = [(int(np.prod(t.shape)), t.dtype.itemsize) for t in tensors.values()]
    report: dict[str, Any] = {
        "tensors": len(tensors),
        "parameters": sum(n for n, _ in sizes),
        "bytes": sum(n * b for n, b in sizes),
    }
    if lora is not None:
        report |= {"merged": merged, "deltas_of_zero": zero, "delta_kept": kept / wanted if wanted else 1.0}
    return report


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)


def _unit(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """One unit in the last place of `dtype` at the magnitude of x (float64)."""
    mantissa = {"float32": 23, "bfloat16": 7}[dtype.name]
    return np.exp2(np.floor(np.log2(np.maximum(np.abs(x), 2.0**-126))) - mantissa)
