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
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    stated = dict(part.split("=") for part in window[1].split()) if window else {}
    flops = 2 * out.dims[labels[3].index("b")] * out.dims[labels[3].index("f")] * rhs.dims[labels[2].index("i")]
    spatial = sorted(c for c in labels[1] if c.isdigit())
    for n, label in enumerate(spatial):
        low = int(_window_entry(stated, "pad", n, "0_0").split("_")[0])
        flops *= _count_tap_inputs(
            lhs.dims[labels[1].index(label)],
            out.dims[labels[3].index(label)],
            int(_window_entry(stated, "size", n, "1")),
            int(_window_entry(stated, "stride", n, "1")),
            int(_window_entry(stated, "lhs_dilate", n, "1")),
            int(_window_entry(stated, "rhs_dilate", n, "1")),
            low,
        )
    groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    return flops / (int(groups[1]) if groups else 1)


def _window_entry(window: dict[str, str], key: str, dim: int, default: str) -> str:
    """Return what a window states under `key` for one spatial dim, or the default."""
    return window[key].split("x")[dim] if key in window else default


@cache
def _count_tap_inputs(inputs: int, outputs: int, taps: int, stride: int, lhs_dilate: int, rhs_dilate: int, pad: int) -> int:
    """Count pairs (output, tap) along one spatial dim whose input exists, that is, is neither padding nor a dilation hole."""
    pairs = 0
    starts = np.arange(outputs) * stride - pad
    for tap in range(taps):
        positions = starts + tap * rhs_dilate
        pairs += int(np.sum((positions >= 0) & (positions % lhs_dilate == 0) & (positions // lhs_dilate < inputs)))
    return pairs
