"""Weights in few bits: against float64, bitsandbytes' levels, one device, and in what a compiled step sends."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.machine.mesh import make_mesh, put_batch
from moe_train.model.parameters import combine, parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.quantize import (
    NF4,
    Quantized,
    _from_e4m3,
    _select,
    _to_e4m3,
    dequantize,
    quantize,
    quantize_like,
    unquantized_shapes,
)
from moe_train.model.sharding.fsdp import project
from moe_train.model.sharding.specs import activation_spec
from moe_train.model.transformer import abstract_model
from tests.tiny import EIGHT, ONE

# bitsandbytes 0.45, functional.py, get_4bit_type("nf4")
LEVELS = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
F32 = np.dtype("float32")
KINDS = (
    config.Nf4(name="nf4", block_size=8),
    config.Int8(name="int8", block_size=8),
    config.Fp8(name="fp8", block_size=8),
)
NAMES = [how.name for how in KINDS]
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
MODEL = config.Model(
    family="mixtral",
    vocab_size=24,
    model_dim=16,
    num_layers=2,
    attention=config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8),
    ffn=config.MoeFfn(name="moe", ffn_dim=16, num_experts=4, experts_per_token=2),
)
TARGETS = (config.LoraTarget(modules=("attention.*", "ffn.*"), rank=2, alpha=4.0),)


def reference(w: np.ndarray, kind: str, block: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """(what comes back, largest error that rounding to the nearest allows) in float64, block by block."""
    numbers = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float64) / 448
    levels = {"nf4": np.array(LEVELS), "int8": np.arange(-127, 128) / 127, "fp8": numbers[~np.isnan(numbers)]}[kind]
    most = {"nf4": 1, "int8": 127, "fp8": 448}[kind]
    dtype = np.float32 if kind == "fp8" else dtype
    out, limit = np.empty(w.shape, np.float64), np.empty(w.shape, np.float64)
    flat, flat_out, flat_limit = (x.reshape(-1, block) for x in (w.astype(np.float64), out, limit))
    for i, values in enumerate(flat):
        scale = most * float(np.asarray(np.abs(values).max() / most).astype(dtype))
        for j, value in enumerate(values):
            flat_out[i, j] = scale * levels[np.abs(value - scale * levels).argmin()]
            flat_limit[i, j] = np.abs(value - flat_out[i, j])
    return out, limit


def test_levels_are_those_of_bitsandbytes() -> None:
    assert list(NF4) == LEVELS


def test_levels_are_selected_without_a_lookup_too() -> None:
    np.testing.assert_array_equal(_select(jnp.arange(16, dtype=jnp.uint8)), np.array(LEVELS, np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "dim"), [("nf4", -1), ("nf4", -2), ("int8", -3), ("fp8", -2)])
def test_values_are_the_nearest_of_a_float64_reference(kind: Any, dim: int, dtype: str) -> None:
    """Except near the middle between two levels, where float32 may take either."""
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(3, 5, 256)) * np.exp(rng.normal(size=(3, 5, 1)) * 3)).astype(np.dtype(dtype))
    w[0, 0, :64] = 0
    w[0, 1, :64] = 2.5
    w[0, 2, 3] = 1e4  # an outlier spoils its own block alone
    turned = np.moveaxis(w, -1, dim)
    scale_dtype = np.uint32 if kind == "fp8" else w.dtype
    found = Quantized(*map(np.asarray, jax.jit(lambda w: quantize(w, kind, 64, w.dtype, dim))(turned)))
    assert found.kind == kind
    assert found.shape == turned.shape and found.dim == dim and found.scales.dtype == scale_dtype
    assert np.moveaxis(found.scales, dim, -1).shape == (3, 5, 4)
    assert found.codes.nbytes == w.size // (2 if kind == "nf4" else 1)
    back = np.asarray(jax.jit(lambda q: dequantize(q, F32))(Quantized(*map(jnp.asarray, found))), np.float64)
    back = np.moveaxis(back, dim, -1)
    wanted, least = reference(w, kind, 64, np.dtype(dtype))
    error = np.abs(back - w.astype(np.float64))
    block_max = np.repeat(np.abs(w.astype(np.float64)).reshape(3, 5, 4, 64).max(-1), 64, -1).reshape(w.shape)
    assert np.all(error <= least + 1e-6 * block_max)
    assert np.mean(np.abs(back - wanted) <= 1e-6 * block_max) > 0.99
    assert not back[0, 0, :64].any()
    np.testing.assert_allclose(back[0, 1, :64], 2.5, rtol=1e-6 if dtype == "float32" else 5e-3)
    normal = rng.normal(size=(64, 1024)).astype(np.float32)
    lost = np.sqrt(np.mean((np.asarray(dequantize(quantize(jnp.asarray(normal), kind, 64, F32, -1), F32)) - normal) ** 2))
    low, high = {"nf4": (0.07, 0.1), "int8": (0.004, 0.008), "fp8": (0.02, 0.03)}[kind]  # of normal numbers
    assert low < lost < high


def test_e4m3_is_that_of_the_library() -> None:
    codes = np.arange(256, dtype=np.uint8)
    numbers = codes.view(E4M3).astype(np.float32)
    codes = codes[~np.isnan(numbers)]
    numbers = numbers[~np.isnan(numbers)]
    np.testing.assert_array_equal(np.asarray(_from_e4m3(jnp.asarray(codes.view(np.int8)))).view(np.uint32), numbers.view(np.uint32))
    between = np.sort(numbers)
    ties = (between[1:] + between[:-1]) / 2
    x = np.concatenate([numbers, ties, np.nextafter(ties, np.float32(0)), np.random.default_rng(0).normal(0, 100, 9999)])
    x = np.clip(x, -448, 448).astype(np.float32)
    ours = np.asarray(jax.jit(_to_e4m3)(x)).view(np.uint8)
    np.testing.assert_array_equal(ours, x.astype(E4M3).view(np.uint8))


def lora_of(how: Any) -> config.Lora:
    return config.Lora(targets=TARGETS, quantize=how)


def loss_of(structure: Any) -> Any:
    def loss(trainable: Any, frozen: Any, *batch: jax.Array) -> jax.Array:
        model = combine(structure, trainable, frozen)
        return jnp.mean(jnp.square(model.logits(model(*batch)[0])))

    return jax.value_and_grad(loss)


def split(arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {p: x for p, x in arrays.items() if ParameterPath.parse(p).is_adapter}, {
        p: x for p, x in arrays.items() if not ParameterPath.parse(p).is_adapter
    }


def batch_on(mesh: jax.sharding.Mesh) -> Any:
    ids = np.random.default_rng(0).integers(0, 24, (8, 6)).astype(np.int32)
    return put_batch((ids, np.tile(np.arange(6, dtype=np.int32), (8, 1)), np.ones_like(ids)), mesh)


def test_a_product_with_fp8_weights_is_that_of_their_values_on_any_mesh() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 6, 16)).astype(np.float32)
    w = rng.normal(size=(16, 4, 8)).astype(np.float32)
    values = np.asarray(dequantize(quantize(jnp.asarray(w), "fp8", 4, F32, -3), F32))
    for mesh in (ONE, EIGHT):
        with jax.set_mesh(mesh):
            x_BTD = jax.device_put(x, jax.sharding.NamedSharding(mesh, activation_spec("BTD")))
            arrays = {"m.weight": jax.device_put(w, jax.sharding.NamedSharding(mesh, P("fsdp", "tensor", None)))}
            like = Quantized(jax.ShapeDtypeStruct((16, 4, 8), np.int8), jax.ShapeDtypeStruct((4, 4, 8), np.uint32))
            quantize_like(arrays, {"m.weight.codes": like.codes, "m.weight.scales": like.scales})
            codes, scales = arrays["m.weight.codes"], arrays["m.weight.scales"]
            y = jax.jit(lambda x, *w: project("BTD,DNH->BTNH", x, Quantized(*w)))(x_BTD, codes, scales)
        np.testing.assert_allclose(np.asarray(y), np.einsum("BTD,DNH->BTNH", x, values), atol=1e-5)


@pytest.mark.parametrize("how", [*KINDS[:2], pytest.param(KINDS[2], marks=pytest.mark.slow)], ids=NAMES)
def test_a_quantised_model_is_the_model_of_its_values_on_any_mesh(how: Any) -> None:
    """Loss and adapters' gradients equal those beside full weights of the same values, on one device and on eight."""
    rng = np.random.default_rng(0)
    with jax.set_mesh(ONE):
        structure, shapes = parameters(abstract_model(MODEL, config.Compute(), lora_of(how)))
        plain_structure, plain = parameters(abstract_model(MODEL, config.Compute(), lora_of(None)))
        assert {p: x.shape for p, x in unquantized_shapes(shapes).items()} == {p: x.shape for p, x in plain.items()}
        held = {p.removesuffix(".codes") for p in shapes if p.endswith(".codes")}
        assert held == {p for p in plain if p.endswith("_proj.weight")}
        host = {p: rng.normal(0, 0.1, x.shape).astype(np.float32) for p, x in plain.items()}

    def values(path: str) -> np.ndarray:
        if path not in held:
            return host[path]
        dim = -3 if ".attention." in path and "o_proj" not in path else -2  # (D, N, H); (N, H, D), (E, in, out)
        return np.asarray(dequantize(quantize(jnp.asarray(host[path]), how.name, 8, F32, dim), F32))

    with jax.set_mesh(ONE):
        full = {p: jax.device_put(values(p), jax.sharding.NamedSharding(ONE, P())) for p in host}
        wanted = jax.jit(loss_of(plain_structure))(*split(full), *batch_on(ONE))
    for mesh in (ONE, EIGHT) if how.name == "nf4" else (EIGHT,):
        with jax.set_mesh(mesh):
            structure, shapes = parameters(abstract_model(MODEL, config.Compute(), lora_of(how)))
            arrays = {
                p: jax.device_put(host[p], jax.sharding.NamedSharding(mesh, x.sharding.spec))
                for p, x in unquantized_shapes(shapes).items()
            }
            held_in_few = quantize_like(arrays, shapes)
            assert {p: (x.shape, x.dtype, x.sharding.spec) for p, x in held_in_few.items()} == {
                p: (x.shape, x.dtype, x.sharding.spec) for p, x in shapes.items()
            }
            step = jax.jit(loss_of(structure)).lower(*split(held_in_few), *batch_on(mesh)).compile()
            found = step(*split(held_in_few), *batch_on(mesh))
        assert abs(float(found[0]) / float(wanted[0]) - 1) < 1e-5
        for path, gradient in wanted[1].items():
            np.testing.assert_allclose(
                np.asarray(found[1][path]), np.asarray(gradient), rtol=0, atol=1e-5 * float(jnp.abs(gradient).max()), err_msg=path
            )


def test_blocks_lie_whole_on_a_device() -> None:
    def made(mesh: jax.sharding.Mesh, block: int) -> None:
        with jax.set_mesh(mesh):
            abstract_model(MODEL, config.Compute(), lora_of(config.Nf4(name="nf4", block_size=block)))

    with pytest.raises(ValueError, match=r"block_size 64 does not divide the inputs of attention\.._proj, 16; use 16"):
        made(ONE, 64)
    flat = make_mesh(config.Mesh(fsdp=4), jax.devices()[:4])
    with pytest.raises(ValueError, match=r"of attention.._proj, 16 over mesh.fsdp 4 = 4; use 4"):
        made(flat, 8)
    made(flat, 4)


@pytest.mark.parametrize("how", [*KINDS[:2], pytest.param(KINDS[2], marks=pytest.mark.slow)], ids=NAMES)
def test_what_is_gathered_are_codes(how: Any, collectives: Any) -> None:
    with jax.set_mesh(EIGHT):
        structure, shapes = parameters(abstract_model(MODEL, config.Compute(), lora_of(how)))
        batch = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in batch_on(EIGHT)]
        on_mesh = {
            p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(EIGHT, x.sharding.spec))
            for p, x in shapes.items()
        }
        text = jax.jit(loss_of(structure)).lower(*split(on_mesh), *batch).compile().as_text()
    # of one layer, gathered over fsdp: this device's half of the experts and of the columns
    wide = [line for line in text.splitlines() if "all-gather" in line and ("f32[2,16,8]" in line or "f32[2,8,16]" in line)]
    codes = {
        "nf4": ("u8[2,8,8]", "u8[2,4,16]"),
        "int8": ("s8[2,16,8]", "s8[2,8,16]"),
        "fp8": ("s8[2,16,8]", "s8[2,8,16]"),
    }[how.name]
    assert not wide
    for shape in codes:
        assert any("all-gather" in line and shape in line for line in text.splitlines()), shape
