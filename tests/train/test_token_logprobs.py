"""Log-probabilities and entropies against a plain reference, over meshes; what is never in memory."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.machine.mesh import BATCH
from moe_train.train import logits
from moe_train.train.token_logprobs import token_logprobs
from tests.meshes import mesh_of

B, T, D, J, V = 8, 152, 12, 3, 48
MESHES = {
    "one device": mesh_of(config.Mesh()),
    "data": mesh_of(config.Mesh(data=8)),
    "fsdp": mesh_of(config.Mesh(fsdp=4)),
    "context": mesh_of(config.Mesh(context=8)),
    "tensor": mesh_of(config.Mesh(tensor=8)),
    "data, fsdp, tensor": mesh_of(config.Mesh(data=2, fsdp=2, tensor=2)),
    "fsdp, context, tensor": mesh_of(config.Mesh(fsdp=2, context=2, tensor=2)),
    "data, context, tensor": mesh_of(config.Mesh(data=2, context=2, tensor=2)),
    "fsdp, expert": mesh_of(config.Mesh(fsdp=2, expert=4)),
}
NAMES = ("hidden", "head", "lora input", "lora output")
SPECS = (P(BATCH, "context", None), P("tensor", "fsdp"), P(BATCH, "context", None), P("tensor", None))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 tokens at a time, which no mesh's part is a multiple of."""
    monkeypatch.setattr(logits, "CHUNK_ELEMENTS", 128 * V)


def operands(scale: float = 1.0) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray]:
    """(hidden, head and the two LoRA factors; targets; a weight for each token's log-probability and entropy)."""
    rng = np.random.default_rng(0)
    shapes = ((B, T, D), (V, D), (B, T, J), (V, J))
    inputs = tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)
    weights = rng.normal(size=(2, B, T)) * (rng.random((2, B, T)) < 0.6)
    return (inputs[0] * np.float32(scale), *inputs[1:]), rng.integers(0, V, (B, T)).astype(np.int32), weights.astype(np.float32)


@jax.jit
def plain(inputs: Any, targets: Any, weights: Any) -> Any:
    """(outputs, gradients) of all logits at once."""

    def total(inputs: Any) -> Any:
        hidden, head, x, w = inputs
        logprobs = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", hidden, head) + jnp.einsum("BTJ,VJ->BTV", x, w))
        at_target = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        return jnp.sum(weights[0] * at_target + weights[1] * entropy), (at_target, entropy)

    gradients, outputs = jax.grad(total, has_aux=True)(inputs)
    return outputs, gradients


def exact(inputs: Any, targets: Any, weights: Any) -> Any:
    with jax.enable_x64(True):
        return jax.device_get(plain(tuple(np.float64(x) for x in inputs), targets, np.float64(weights)))


@cache
def chunked(mesh: Mesh) -> Any:
    def total(inputs: Any, targets: jax.Array, weights: jax.Array) -> Any:
        hidden, head, *factors = inputs
        outputs = token_logprobs(hidden, head, targets, tuple(factors) or None)  # type: ignore[arg-type]
        return jnp.sum(weights[0] * outputs.logprob + weights[1] * outputs.entropy), outputs

    def run(inputs: Any, targets: jax.Array, weights: jax.Array) -> Any:
        gradients, outputs = jax.grad(total, has_aux=True)(inputs, targets, weights)
        return outputs, gradients

    return jax.jit(run)


def placed(mesh: Mesh, inputs: Any, targets: Any, weights: Any) -> Any:
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    specs = SPECS[: len(inputs)]
    on_mesh = tuple(put(x, spec) for x, spec in zip(inputs, specs, strict=True))
    return on_mesh, put(targets, P(BATCH, "context")), put(weights, P(None, BATCH, "context"))


def found(mesh: Mesh, inputs: Any, targets: Any, weights: Any) -> Any:
    with jax.set_mesh(mesh):
        return jax.device_get(chunked(mesh)(*placed(mesh, inputs, targets, weights)))


def check(found: Any, wanted: Any, tolerance: float) -> None:
    """Outputs token by token; gradients relative to the largest entry of each."""
    (outputs, gradients), (wanted_outputs, wanted_gradients) = found, wanted
    for output, wanted_output in zip(outputs, wanted_outputs, strict=True):
        assert output.dtype == np.float32
        np.testing.assert_allclose(output, wanted_output, rtol=tolerance, atol=tolerance)
    for name, a, b in zip(NAMES, gradients, wanted_gradients, strict=False):
        assert np.max(np.abs(np.float64(a) - b)) <= tolerance * np.max(np.abs(b)), name


@pytest.mark.parametrize("mesh", MESHES)
def test_float32_equals_all_logits_at_once(mesh: str) -> None:
    check(found(MESHES[mesh], *operands()), exact(*operands()), 1e-5)


@pytest.mark.parametrize("mesh", ["one device", "data, fsdp, tensor", "fsdp, context, tensor"])
def test_bfloat16_is_as_good_as_its_products(mesh: str) -> None:
    inputs, targets, weights = operands()
    rounded = tuple(np.asarray(x, jnp.bfloat16) for x in inputs)
    wanted = exact(rounded, targets, weights)
    outputs, gradients = found(MESHES[mesh], rounded, targets, weights)
    for output, wanted_output in zip(outputs, wanted[0], strict=True):  # logits are float32 sums
        np.testing.assert_allclose(output, wanted_output, rtol=1e-5, atol=1e-5)
    for name, a, b in zip(NAMES, gradients, wanted[1], strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(np.float64(a) - b) <= 5e-3 * np.linalg.norm(b), name
        assert np.vdot(np.float64(a), b) / np.vdot(b, b) == pytest.approx(1, abs=1e-3), f"{name} is biased"


@pytest.mark.parametrize("mesh", ["one device", "tensor"])
def test_huge_logits_lose_nothing(mesh: str) -> None:
    """Of thousands: the best token has all the probability, or nearly."""
    inputs, targets, weights = operands(scale=1000.0)
    outputs, gradients = found(MESHES[mesh], inputs, targets, weights)
    wanted_outputs, wanted_gradients = exact(inputs, targets, weights)
    assert np.isfinite(outputs.entropy).all() and (outputs.entropy > -1e-3).all()
    np.testing.assert_allclose(outputs.logprob, wanted_outputs[0], rtol=1e-5, atol=1e-2)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        assert np.max(np.abs(a - b)) <= 1e-2 * np.max(np.abs(b))  # differences of logits of size 1000 in float32


@pytest.mark.parametrize("mesh", ["one device", "data, fsdp, tensor"])
def test_masked_tokens_have_no_gradient(mesh: str) -> None:
    inputs, targets, weights = operands()
    _, gradients = found(MESHES[mesh], inputs, targets, np.zeros_like(weights))
    assert not any(gradient.any() for gradient in gradients)
    _, gradients = found(MESHES[mesh], inputs, targets, weights * (np.arange(T) < 7))
    assert gradients[0][:, :7].any() and not gradients[0][:, 7:].any()


@pytest.mark.parametrize("length", [1, 100, 128])
def test_any_number_of_tokens(length: int) -> None:
    """One token, fewer than a chunk, a whole one."""
    (hidden, head, x, w), targets, weights = operands()
    arrays = ((hidden[:1, :length], head, x[:1, :length], w), targets[:1, :length], weights[:, :1, :length])
    check(found(MESHES["one device"], *arrays), exact(*arrays), 1e-5)


def test_a_head_without_an_adapter() -> None:
    (hidden, head, x, w), targets, weights = operands()
    outputs, gradients = found(MESHES["fsdp, context, tensor"], (hidden, head), targets, weights)
    check((outputs, gradients), (lambda o, g: (o, g[:2]))(*exact((hidden, head, 0 * x, w), targets, weights)), 1e-5)


def shapes_in(program: str) -> set[tuple[int, ...]]:
    """Shapes of all arrays that an optimized program names."""
    found = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", program)
    return {tuple(int(n) for n in dims.split(",")) for dims in found}


def test_the_logits_of_the_batch_are_never_in_memory() -> None:
    """Neither whole nor as a stack of chunks, forward or backward; a chunk's logits are."""
    one = MESHES["one device"]
    with jax.set_mesh(one):
        text = chunked(one).lower(*placed(one, *operands())).compile().as_text()
    largest = max(int(np.prod(shape)) for shape in shapes_in(text))
    assert largest < 1.1 * B * T * D < B * T * V  # the hidden states, in whole chunks
    assert any(shape[1:] == (V,) and 128 <= shape[0] <= 256 for shape in shapes_in(text))
    everything = plain.lower(*operands()).compile().as_text()
    assert max(int(np.prod(shape)) for shape in shapes_in(everything)) >= B * T * V


def test_a_frozen_head_costs_no_gradient() -> None:
    """Where adapters alone are trained, the product for the head's gradient is not in the program."""
    one, (inputs, targets, weights) = MESHES["one device"], operands()
    total = lambda hidden, head, targets, weights: jnp.sum(weights[0] * token_logprobs(hidden, head, targets)[0])  # noqa: E731
    with jax.set_mesh(one):
        (hidden, head), targets, weights = placed(one, inputs[:2], targets, weights)
        both, hidden_alone = (
            jax.jit(jax.grad(total, wanted)).lower(hidden, head, targets, weights).compile().cost_analysis()["flops"]
            for wanted in ((0, 1), 0)
        )
    assert both - hidden_alone >= 2 * 128 * V * D  # of the one chunk that is counted
