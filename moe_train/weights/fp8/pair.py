"""Which tensors of a file are the scales of which FP8 tensors, whatever the spelling.

- Mistral's own files: `X.weight` with `X.qscale_weight`; activations `X.qscale_act` and `*_fake_quantizer.*`.
- Hugging Face: `X.weight` with `X.weight_scale_inv`, which multiplies in spite of its name; activations `X.activation_scale`.
- Its fused experts: `experts.gate_up_proj` with `experts.gate_up_proj_scale_inv`, one scale per expert or one for each half.
- compressed-tensors: `X.weight` with `X.weight_scale`; activations `X.input_scale`.

Scales of activations serve the servers' low-precision products; dequantized weights do not need them.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping

import numpy as np

from moe_train.weights.fp8.sections import Fp8Section
from moe_train.weights.fp8.tensor import E4M3, Fp8Tensor, ScaleGrid
from moe_train.weights.on_disk import StoredTensor

log = logging.getLogger(__name__)

_SCALE_SUFFIXES = ("_scale_inv", "_scale")
"""What follows the name of a weight in the name of its scales; Mistral's own files replace `weight` by `qscale_weight`."""
_WEIGHT_SCALES = (".qscale_weight", ".weight_scale_inv", ".weight_scale", "_proj_scale_inv", "_proj_scale")
"""Ends of the names of scales of weights."""
_ACTIVATION_SCALES = (
    *(".qscale_act", ".activation_scale", "_proj_activation_scale", ".input_scale", ".output_scale"),
    *(".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".prob_scale"),
)
"""Ends of the names of scales of activations and of keys and values in a cache."""
_FAKE_QUANTIZER = "_fake_quantizer."
"""Part of the names of what only Mistral's quantization-aware training used."""


def dequantize_tensors(tensors: Mapping[str, StoredTensor], section: Fp8Section | None) -> dict[str, StoredTensor]:
    """Return the tensors of a model by name, FP8 ones as tensors whose reading dequantizes them; nothing is read.

    Args:
        tensors: every tensor of the files.
        section: what the model's config states; None if it states no quantization.

    Raises:
        ValueError: a scale is missing, has no weight, or does not fit its weight or the config.
    """
    quantized = [name for name, tensor in tensors.items() if tensor.dtype == E4M3]
    if not quantized:
        if section is not None:
            _warn_once(f"{section.file} states FP8 weights, but no tensor of the files is FP8; they are read as they are")
        if section is None:
            return dict(tensors)
    elif section is None:
        file = tensors[quantized[0]].file
        _warn_once(f"{file} has FP8 weights, but no config states a quantization; they are multiplied by the scales next to them")
    scale_names = {name: _scale_name(name, tensors) for name in quantized}
    ignored = [name for name in tensors if _is_activation(name)]
    used = {*scale_names.values(), *ignored}
    result: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if name in scale_names:
            result[name] = _quantized_tensor(tensor, tensors[scale_names[name]], section)
        elif name not in used:
            _check_not_scale(name, tensor)
            result[name] = tensor
    if ignored:
        file = tensors[ignored[0]].file
        _inform_once(
            f"{file}: {len(ignored)} scales of activations such as {ignored[0]} are not read, since training "
            "multiplies by dequantized weights"
        )
    return result


def _is_activation(name: str) -> bool:
    return name.endswith(_ACTIVATION_SCALES) or _FAKE_QUANTIZER in name


def _scale_name(name: str, tensors: Mapping[str, StoredTensor]) -> str:
    """Return the name of a weight's scales. Raises ValueError if there are none, or several."""
    candidates = [name + suffix for suffix in _SCALE_SUFFIXES]
    if name.endswith(".weight"):
        candidates.append(f"{name.removesuffix('weight')}qscale_weight")
    present = [candidate for candidate in candidates if candidate in tensors]
    file = tensors[name].file
    if not present:
        raise ValueError(
            f"{file}: {name} is FP8, but has no scale (looked for {', '.join(candidates)}); download all files of the model again"
        )
    if len(present) > 1:
        raise ValueError(f"{file}: {name} has two scales, {present[0]} and {present[1]}; remove the one that does not belong to it")
    return present[0]


def _check_not_scale(name: str, tensor: StoredTensor) -> None:
    """Raise ValueError if a tensor is the scale of no FP8 weight."""
    if name.endswith(_WEIGHT_SCALES):
        raise ValueError(
            f"{tensor.file}: {name} is the scale of no FP8 weight in the files; download all files of the model again, or "
            "remove the scale if the weight was dequantized"
        )


def _quantized_tensor(codes: StoredTensor, scales: StoredTensor, section: Fp8Section | None) -> Fp8Tensor:
    """Join a tensor and its scales. Raises ValueError if they do not fit together."""
    stated = section or Fp8Section("the config")
    if len(codes.shape) not in (2, 3):
        raise ValueError(f"{codes.file}: {codes.name} of shape {codes.shape} is FP8; only matrices are supported")
    if scales.dtype.kind != "f" and scales.dtype.name != "bfloat16":
        raise ValueError(f"{scales.file}: {scales.name} is {scales.dtype.name}; scales have to be float32, bfloat16 or float16")
    grid = scale_grid(codes.name, codes.shape, scales.shape, stated)
    if grid is None:
        raise ValueError(
            f"{scales.file}: {scales.name} has the shape {scales.shape}, which does not fit {codes.name} of shape {codes.shape}; "
            f"supported: one scale, one per output, or {_blocks(codes.shape, stated.block)} for blocks of {stated.block[0]} x "
            f"{stated.block[1]}"
        )
    if contradiction := _contradiction(grid, codes.shape, stated):
        raise ValueError(f"{stated.file} states {contradiction}, but {scales.name} of {scales.file} has the shape {scales.shape}")
    return Fp8Tensor(codes, scales, grid, np.dtype(stated.dtype))


def _blocks(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Return the number of blocks along each dim."""
    return (*shape[:-2], math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1]))


def scale_grid(name: str, shape: tuple[int, ...], scales: tuple[int, ...], section: Fp8Section) -> ScaleGrid | None:
    """Return how scales of a shape lie over a tensor; None if they do not fit.

    Args:
        name: name of the tensor, since only `gate_up_proj` may have a scale for each half of its outputs.
        shape: shape of the tensor: (outputs, inputs), or (experts, outputs, inputs).
        scales: shape of the scales; dims of size 1 may be missing at the end.
        section: what the config states.
    """
    *lead, outputs, inputs = shape
    blocks = _blocks(shape, section.block)
    halves: list[tuple[tuple[int, ...], tuple[int, int]]] = []
    if lead and name.endswith("gate_up_proj") and outputs % 2 == 0:
        # A fused tensor keeps a scale for gate and one for up, also where a single block would cover both.
        halves += [((*lead, 2, 1), (outputs // 2, inputs)), ((*lead, 2, blocks[-1]), (outputs // 2, section.block[1]))]
    # Steps along outputs and inputs for each number of scales; what the config states comes before what it does not.
    layouts = [((*lead, 1, 1), (outputs, inputs)), ((*lead, outputs, 1), (1, inputs)), *halves]
    if section.granularity == "block":
        layouts.insert(2, (blocks, section.block))
    elif section.granularity is None:
        layouts.append((blocks, section.block))
    for grid, steps in layouts:
        if _fits(scales, grid):
            return ScaleGrid(grid, (*(1 for _ in lead), *steps))
    if math.prod(scales) == 1:  # one scale for all experts
        return ScaleGrid((1,) * len(shape), shape)
    return None


def _fits(scales: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    """Return whether a shape is the grid, or the grid without dims of size 1 at its end."""
    if not scales:
        return math.prod(grid) == 1
    return scales == grid[: len(scales)] and math.prod(grid[len(scales) :]) == 1


def _contradiction(grid: ScaleGrid, shape: tuple[int, ...], section: Fp8Section) -> str | None:
    """Return what a config states that the scales contradict; None if they agree."""
    per_matrix = math.prod(grid.shape[-2:])
    if section.granularity == "tensor" and (per_matrix > 2 or (per_matrix == 2 and len(shape) == 2)):
        return "one scale per tensor"
    if section.granularity == "channel" and grid.shape[-2] != shape[-2]:
        return "one scale per output"
    if section.granularity == "block" and per_matrix < math.prod(_blocks(shape, section.block)[-2:]):
        return f"blocks of {section.block[0]} x {section.block[1]}"
    return None


@functools.lru_cache
def _warn_once(message: str) -> None:
    """Warn of something once in a process, although a model is opened several times."""
    log.warning(message)


@functools.lru_cache
def _inform_once(message: str) -> None:
    """Report something once in a process."""
    log.info(message)
