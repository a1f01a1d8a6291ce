"""Chunked cross-entropy against optax in float64, over meshes; what is never in memory."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.machine.mesh import BATCH
from moe_train.train import cross_entropy, logits
from tests.meshes import mesh_of

B, T, D, V = 8, 150, 12, 48
MESHES = {
    "one device": mesh_of(config.Mesh()),
    "tensor": mesh_of(config.Mesh(tensor=8)),
    "data, fsdp, tensor": mesh_of(config.Mesh(data=2, fsdp=2, tensor=2)),
    "fsdp, expert": mesh_of(config.Mesh(fsdp=2, expert=4)),
}
MASKS = ("random", "everything", "nothing", "one token")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 tokens at a time, which no mesh's part is a multiple of."""
    monkeypatch.setattr(logits, "CHUNK_ELEMENTS", 128 * V)


def operands(mask: str) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    hidden, head = (rng.normal(size=shape).astype(np.float32) for shape in ((B, T, D), (V, D)))
    chosen = {"random": rng.random((B, T)) < 0.6, "everything": np.ones((B, T), bool), "nothing": np.zeros((B, T), bool)}
    chosen["one token"] = chosen["nothing"].copy()
    chosen["one token"][3, 7] = True
    return hidden, head, rng.integers(0, V, (B, T)).astype(np.int32), chosen[mask]


@jax.jit
def plain(hidden: Any, head: Any, targets: Any, mask: Any) -> Any:
    def total(hidden: Any, head: Any) -> Any:
        logits = jnp.einsum("BTD,VD->BTV", hidden, head)
        return jnp.sum(jnp.where(mask, optax.softmax_cross_entropy_with_integer_labels(logits, targets), 0))

    return jax.value_and_grad(total, (0, 1))(hidden, head)


def exact(hidden: Any, head: Any, targets: Any, mask: Any) -> tuple[Any, tuple[Any, Any]]:
    with jax.enable_x64(True):
        return jax.device_get(plain(np.float64(hidden), np.float64(head), targets, mask))


@cache
def compiled(mesh: Mesh, scale: float = 1.0) -> Any:
    def total(hidden: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        return cross_entropy.cross_entropy_sum(hidden, head, targets, mask) * scale

    return jax.jit(jax.value_and_grad(total, (0, 1)))


def placed(mesh: Mesh, *arrays: Any) -> list[jax.Array]:
    specs = (P(BATCH, "context", None), P("tensor", "fsdp"), P(BATCH, "context"), P(BATCH, "context"))
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]


def found(mesh: Mesh, *arrays: Any, scale: float = 1.0) -> tuple[Any, tuple[Any, Any]]:
    with jax.set_mesh(mesh):
        return jax.device_get(compiled(mesh, scale)(*placed(mesh, *arrays)))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("mask", MASKS)
def test_equals_optax(mesh: str, mask: str) -> None:
    arrays = operands(mask)
    (total, grads), (wanted_total, wanted_grads) = found(MESHES[mesh], *arrays), exact(*arrays)
    assert total == pytest.approx(wanted_total, rel=1e-6)
    for name, a, b in zip(("hidden", "head"), grads, wanted_grads, strict=True):
        assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(b)), name
    if mask != "nothing":
        assert total > 0 and not grads[0][~arrays[3]].any()


@pytest.mark.parametrize("mesh", ["one device", "tensor"])
def test_large_logits_stay_finite(mesh: str) -> None:
    hidden, head, targets, mask = operands("random")
    arrays = (1000 * hidden, head, targets, mask)
    (total, grads), (wanted_total, wanted_grads) = found(MESHES[mesh], *arrays), exact(*arrays)
    assert total == pytest.approx(wanted_total, rel=1e-5)
    for a, b in zip(grads, wanted_grads, strict=True):
        assert np.max(np.abs(a - b)) <= 1e-2 * np.max(np.abs(b))  # differences of logits of size 1000 in float32


@pytest.mark.parametrize("mesh", ["one device", "data, fsdp, tensor"])
def test_bfloat16_is_scaled_in_float32(mesh: str) -> None:
    """A mean over tokens scales the gradients: by a factor that bfloat16 cannot hold, they must not all be off alike."""
    hidden, head, targets, mask = operands("random")
    hidden, head = (np.asarray(x, jnp.bfloat16) for x in (hidden, head))
    scale = 1 / 723
    total, grads = found(MESHES[mesh], hidden, head, targets, mask, scale=scale)
    wanted_total, wanted_grads = exact(hidden, head, targets, mask)
    assert total == pytest.approx(wanted_total * scale, rel=1e-3)
    for a, b in zip(grads, wanted_grads, strict=True):
        a, b = np.float64(a), b * scale
        assert np.max(np.abs(a - b)) <= 1e-2 * np.max(np.abs(b))
        assert np.vdot(a, b) / np.vdot(b, b) == pytest.approx(1, abs=5e-4)


def largest_array(program: str) -> int:
    """Elements of the largest array that an optimized program names."""
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", program)
    return max(int(np.prod([int(n) for n in dims.split(",")])) for dims in shapes)


def test_the_logits_of_the_batch_are_never_in_memory() -> None:
    one, arrays = MESHES["one device"], operands("random")
    assert largest_array(plain.lower(*arrays).compile().as_text()) >= B * T * V
    with jax.set_mesh(one):
        ours = compiled(one).lower(*placed(one, *arrays)).compile().as_text()
    assert largest_array(ours) == B * T * D  # the hidden states; a chunk's logits are a fifth of them, 240 * V


def test_a_frozen_head_costs_no_gradient() -> None:
    """Where adapters alone are trained, the product for the head's gradient is not in the program."""
    one, arrays = MESHES["one device"], operands("random")
    with jax.set_mesh(one):
        both, hidden_alone = (
            jax.jit(jax.grad(cross_entropy.cross_entropy_sum, wanted))
            .lower(*placed(one, *arrays))
            .compile()
            .cost_analysis()["flops"]
            for wanted in ((0, 1), 0)
        )
    assert both - hidden_alone >= 2 * 128 * V * D  # of the one chunk that is counted
