"""FLOPs of the matrix products of an HLO module, which XLA:TPU writes as convolutions."""

from __future__ import annotations

import math
import re
from functools import cache

import numpy as np

from moe_train.plan.hlo_text import Instruction, ShapesByName, operand_shapes, stated_shapes


def dot_flops(i: Instruction, known: ShapesByName) -> float:
    """Return the FLOPs of a `dot`: two for each entry of the result and of the contracted dims."""
    lhs = operand_shapes(i, known)[0]
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
    depth = 1
    if dims:
        depth = math.prod(lhs.dims[int(d)] for d in dims[1].split(",") if d)
    return 2 * math.prod(stated_shapes(i.result)[0].dims) * depth


def cublas_flops(i: Instruction, known: ShapesByName) -> float:
    """Return the FLOPs of a call of cuBLAS, counted like `dot_flops`; 0 if the call states no contracted dims."""
    dims = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.attributes)
    if dims is None:
        return 0
    lhs = operand_shapes(i, known)[0]
    depth = math.prod(lhs.dims[int(d.strip('"'))] for d in dims[1].split(",") if d)
    return 2 * math.prod(stated_shapes(i.result)[0].dims) * depth


def convolution_flops(i: Instruction, known: ShapesByName) -> float:
    """Return the FLOPs of a convolution.

    Each pair of a kernel tap and an existing entry of the operand counts two FLOPs, over all channels.
    """
    lhs, rhs = operand_shapes(i, known)[:2]
    (out,) = stated_shapes(i.result)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels, i
    lhs_labels, rhs_labels, out_labels = labels.groups()
    stated_window = re.search(r"window=\{([^}]*)\}", i.attributes)
    window: dict[str, str] = {}
    if stated_window:
        window = dict(part.split("=") for part in stated_window[1].split())
    flops = 2 * out.dims[out_labels.index("b")] * out.dims[out_labels.index("f")] * rhs.dims[rhs_labels.index("i")]
    # Spatial dims are labelled by digits, batch and features by letters.
    spatial = sorted(c for c in lhs_labels if c.isdigit())
    for n, label in enumerate(spatial):
        flops *= _count_tap_inputs(
            inputs=lhs.dims[lhs_labels.index(label)],
            outputs=out.dims[out_labels.index(label)],
            taps=int(_window_entry(window, "size", n, "1")),
            stride=int(_window_entry(window, "stride", n, "1")),
            lhs_dilate=int(_window_entry(window, "lhs_dilate", n, "1")),
            rhs_dilate=int(_window_entry(window, "rhs_dilate", n, "1")),
            pad=int(_window_entry(window, "pad", n, "0_0").split("_")[0]),
        )
    groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    # With groups of the batch, each output feature belongs to one of them.
    return flops / int(groups[1]) if groups else flops


def _window_entry(window: dict[str, str], key: str, dim: int, default: str) -> str:
    """Return what a window states under `key` for one spatial dim, or the default."""
    if key not in window:
        return default
    return window[key].split("x")[dim]


@cache
def _count_tap_inputs(inputs: int, outputs: int, taps: int, stride: int, lhs_dilate: int, rhs_dilate: int, pad: int) -> int:
    """Count pairs (output, tap) along one spatial dim whose input exists, that is, is neither padding nor a dilation hole."""
    pairs = 0
    starts = np.arange(outputs) * stride - pad
    for tap in range(taps):
        positions = starts + tap * rhs_dilate
        pairs += int(np.sum((positions >= 0) & (positions % lhs_dilate == 0) & (positions // lhs_dilate < inputs)))
    return pairs
