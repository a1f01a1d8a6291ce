"""Before step 0, on the device that will train: the grouped matmul against its plain reference.

A kernel can be right on one chip and wrong on the next: wrong gradients for empty groups, for groups that do not
fill a tile, for one group that has it all. Errors are relative to each expert's own part, so that a small group's
cannot hide behind a large one's.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.mesh import make_mesh
from moe_train.model import grouped_matmul as gm

ROWS, IN, OUT = 1024, 256, 128
CASES = {
    "even": (128, 128, 128, 128, 128, 128, 128, 128),
    "empty": (0, 256, 0, 0, 300, 0, 68, 0),
    "unaligned": (1, 127, 129, 3, 255, 65, 31, 200),
    "skewed": (0, 0, 1000, 0, 1, 0, 0, 23),
    "no rows": (0, 0, 0, 0, 0, 0, 0, 0),
}
"""Rows of each of 8 experts; what is left of ROWS belongs to nobody."""


def check_grouped_matmul(compute: config.Compute) -> float:
    """The largest relative error of the result and both gradients, over all cases.

    Raises RuntimeError where it is more than rounding in the compute dtype explains.
    """
    dtype = jnp.dtype(compute.dtype)
    device = jax.local_devices()[0]
    with jax.set_mesh(make_mesh(config.Mesh(), [device])):
        kernel = gm.choose_kernel(compute.grouped_matmul)
        # elsewhere a float32 product may round its operands to bfloat16 or tf32
        tolerance = 1e-5 if dtype == jnp.float32 and device.platform == "cpu" else 3e-2
        rng = np.random.default_rng(0)
        x_RD, w_EDF, dy_RF = (
            jnp.asarray(rng.normal(size=shape), dtype) for shape in ((ROWS, IN), (len(CASES["even"]), IN, OUT), (ROWS, OUT))
        )

        @jax.jit
        @partial(jax.shard_map, in_specs=P(), out_specs=P())  # local view, as where the model calls it
        def both(
            x: jax.Array, w: jax.Array, dy: jax.Array, sizes: jax.Array
        ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
            y, vjp = jax.vjp(lambda x, w: gm.grouped_matmul(x, w, sizes, kernel), x, w)
            with jax.default_matmul_precision("highest"):
                exact = [a.astype(jnp.float32) for a in (x, w, dy)]
                y_exact, vjp_exact = jax.vjp(lambda x, w: gm.reference(x, w, sizes), *exact[:2])
                return (y, *vjp(dy)), (y_exact, *vjp_exact(exact[2]))

        worst = 0.0
        for case, sizes in CASES.items():
            found, wanted = jax.device_get(both(x_RD, w_EDF, dy_RF, jnp.asarray(sizes, jnp.int32)))
            for what, a, b in zip(("result", "gradient of x", "gradient of w"), found, wanted, strict=True):
                error = _worst_part(a, b, sizes if what != "gradient of w" else None)
                if not error <= tolerance:
                    raise RuntimeError(
                        f"self-test: {what} of grouped_matmul={kernel} is wrong on {device.device_kind}, case {case!r}: "
                        f"relative error {error:.2g}, limit {tolerance:g}; set compute.grouped_matmul to another kernel"
                    )
                worst = max(worst, error)
    return worst


def _worst_part(found: np.ndarray, wanted: np.ndarray, sizes: tuple[int, ...] | None) -> float:
    """max|a - b| / max|b| over the parts of the experts (rows by `sizes`, or dim 0), the tail that nobody owns included;
    a part that has to be zero, and is not, counts as infinitely wrong."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    cuts = list(range(1, len(found))) if sizes is None else np.cumsum(sizes).tolist()
    worst = 0.0
    for a, b in zip(np.split(found, cuts), np.split(wanted, cuts), strict=True):
        if not a.size:
            continue
        error, scale = np.max(np.abs(a - b)), np.max(np.abs(b))
        part = error / scale if scale else (0.0 if error == 0 else np.inf)
        worst = max(worst, float(part)) if np.isfinite(part) else np.inf
    return worst
