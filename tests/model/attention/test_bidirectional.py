"""Attention within segments on every kernel and mesh against the plain reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.machine.mesh import BATCH
from moe_train.model.attention.bidirectional import attend_segments, separated_padding
from tests.meshes import mesh_of

B, N, H = 2, 2, 6
CASES = [("blocked", 300, config.Mesh()), ("splash", 256, config.Mesh()), ("blocked", 40, config.Mesh(fsdp=2, context=2, tensor=2))]


def segments(T: int) -> np.ndarray:
    ids = np.zeros((B, T), np.int32)
    ids[0, : T // 5], ids[0, T // 5 : T // 2], ids[1] = 1, 2, 1
    return ids


def by_definition(q: np.ndarray, k: np.ndarray, v: np.ndarray, ids: np.ndarray) -> np.ndarray:
    scores = np.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(H)
    weights = np.where((ids[:, :, None] == ids[:, None, :])[:, None], np.exp(scores), 0)
    return np.einsum("BNTS,BSNH->BTNH", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(("kernel", "T", "sizes"), CASES, ids=lambda x: str(x)[:9])
def test_every_kernel_equals_the_reference(kernel: str, T: int, sizes: config.Mesh) -> None:
    draw = np.random.default_rng(0)
    q, k, v, dy = (draw.normal(size=(B, T, N, H)).astype(np.float32) for _ in range(4))
    ids = segments(T)
    dy[ids == 0] = 0

    def run(kernel: str, sizes: config.Mesh) -> list[np.ndarray]:
        mesh = mesh_of(sizes)
        with jax.set_mesh(mesh):
            placed = [jax.device_put(x, NamedSharding(mesh, P(BATCH, "context", "tensor"))) for x in (q, k, v, dy)]
            placed_ids = jax.device_put(ids, NamedSharding(mesh, P(BATCH, "context")))

            def both(q: jax.Array, k: jax.Array, v: jax.Array, dy: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
                y, vjp = jax.vjp(lambda q, k, v: attend_segments(q, k, v, separated_padding(ids), kernel), q, k, v)
                return y, *vjp(dy)

            return [np.asarray(x) for x in jax.jit(both)(*placed, placed_ids)]

    plain = run("reference", config.Mesh())
    is_picture = ids > 0
    assert np.abs(plain[0] - by_definition(q, k, v, ids))[is_picture].max() < 1e-5
    for found, expected in zip(run(kernel, sizes), plain, strict=True):
        assert np.abs(found - expected)[is_picture].max() < 2e-5 * np.abs(expected).max()
        assert np.isfinite(found).all()


def test_padding_is_split_into_short_segments() -> None:
    ids = np.array([[1, 1, 2, 0, 0, 0, 0]], np.int32)
    assert separated_padding(jnp.asarray(ids), run=2)[0].tolist() == [1, 1, 2, 9, 10, 10, 11]
