"""Any kernel of attention, with its gradients, against the plain reference on one device."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train.machine.mesh import BATCH
from moe_train.model.attention import kernels
from moe_train.model.attention.places import TokenPlaces
from tests.tiny import ONE

B, N, K, H = 2, 4, 2, 6


def segments_of(T: int) -> tuple[np.ndarray, np.ndarray]:
    """(segment ids, positions): one row whole, one packed with padding at its end."""
    ids, positions = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    for segment, (start, end) in enumerate(((0, T // 5), (T // 5, T // 2), (T // 2, T - T // 8), (T - T // 8, T))):
        ids[1, start:end], positions[1, start:end] = (segment + 1) % 4, np.arange(end - start)
    return ids, positions


def operands(
    T: int, dtype: Any = np.float32, heads: tuple[int, int, int] = (N, K, H), width: int | None = None
) -> tuple[np.ndarray, ...]:
    """q, k, v, dy, where values have another `width` than queries if one is given; what padding gets is not asked for."""
    n, kv, h = heads
    w = width or h
    rng = np.random.default_rng(0)
    q, k, v, dy = (rng.normal(size=(B, T, *shape)).astype(dtype) for shape in ((n, h), (kv, h), (kv, w), (n, w)))
    dy[segments_of(T)[0] == 0] = 0
    return q, k, v, dy


@cache
def compiled(kernel: str, window: int | None, mesh: Mesh = ONE) -> Any:
    @jax.jit
    def run(q: Any, k: Any, v: Any, dy: Any, segments: Any, positions: Any) -> Any:
        y, vjp = jax.vjp(lambda q, k, v: kernels.attend(q, k, v, TokenPlaces(positions, segments), window, kernel), q, k, v)
        return y, *vjp(dy)

    return run


def found(kernel: str, window: int | None, arrays: Any, mesh: Mesh = ONE) -> list[np.ndarray]:
    T = arrays[0].shape[1]
    specs = (P(BATCH, "context", "tensor", None),) * 4 + (P(BATCH, "context"),) * 2
    with jax.set_mesh(mesh):
        placed = (jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((*arrays, *segments_of(T)), specs, strict=True))
        return [np.asarray(x, np.float64) for x in jax.device_get(compiled(kernel, window, mesh)(*placed))]


def check(kernel: str, window: int | None, arrays: Any, tolerance: float, mesh: Mesh = ONE) -> None:
    seen = segments_of(arrays[0].shape[1])[0] != 0
    exact = [x.astype(np.float32) for x in arrays]
    for name, a, b in zip(
        ("y", "dq", "dk", "dv"), found(kernel, window, arrays, mesh), found("reference", window, exact), strict=True
    ):
        assert np.max(np.abs(a - b)[seen]) <= tolerance * np.max(np.abs(b)), name
