"""Adapters: which modules get one, how it starts, how it is split; a fresh adapter changes nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.data.batches.batch import Batch
from moe_train.machine.mesh import put_batch
from moe_train.model.moe.experts import _drop
from moe_train.model.parameters import Parameters, combine, parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.transformer import Transformer, abstract_model, init_model
from moe_train.train.gradients import step_gradients
from moe_train.train.objectives.next_token import next_token
from moe_train.train.objectives.objective import ModelWeights
from moe_train.train.state import partition
from moe_train.train.step_definition import StepDefinition
from tests.tiny import EIGHT, MISTRAL4, ONE

MODEL = config.Model(
    family="mixtral",
    vocab_size=24,
    model_dim=8,
    num_layers=2,
    attention=config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=6),
    ffn=config.MoeFfn(name="moe", ffn_dim=12, num_experts=4, experts_per_token=2),
)


def lora_of(*targets: tuple[tuple[str, ...], int, float]) -> config.Lora:
    return config.Lora(targets=tuple(config.LoraTarget(modules=m, rank=rank, alpha=alpha) for m, rank, alpha in targets))


def abstract(lora: config.Lora) -> Transformer:
    return abstract_model(MODEL, config.Compute(), lora)


def test_patterns_name_modules_and_carry_their_rank() -> None:
    with jax.set_mesh(EIGHT):
        model = abstract(lora_of((("attention.[qv]_proj", "attention.o_proj"), 3, 6.0), (("ffn.*",), 2, 8.0)))
    found = {
        path.removeprefix("stacks.0.layers.0."): (x.shape, x.sharding.spec)
        for path, x in parameters(model)[1].items()
        if ParameterPath.parse(path).is_adapter
    }
    into, out = ((2, 4, 8, 2), P(None, "expert", None, None)), ((2, 4, 2, 8), P(None, "expert", None, None))
    assert found == {
        "attention.q_proj.lora_a": ((2, 8, 3), P(None, "fsdp", None)),
        "attention.q_proj.lora_b": ((2, 3, 4, 6), P(None, None, ("tensor", "expert"), None)),
        "attention.v_proj.lora_a": ((2, 8, 3), P(None, "fsdp", None)),
        "attention.v_proj.lora_b": ((2, 3, 2, 6), P(None, None, "tensor", None)),
        "attention.o_proj.lora_a": ((2, 4, 6, 3), P(None, ("tensor", "expert"), None, None)),
        "attention.o_proj.lora_b": ((2, 3, 8), P(None, None, "fsdp")),
        "ffn.gate_proj.lora_a": into,
        "ffn.up_proj.lora_a": into,
        "ffn.down_proj.lora_b": out,
        "ffn.gate_proj.lora_b": ((2, 4, 2, 12), P(None, "expert", None, "tensor")),
        "ffn.up_proj.lora_b": ((2, 4, 2, 12), P(None, "expert", None, "tensor")),
        "ffn.down_proj.lora_a": ((2, 4, 12, 2), P(None, "expert", "tensor", None)),
    }
    (layer,) = model.stacks[0].layers
    assert layer.attention.q_proj.lora_scale == 2.0 and layer.ffn.down_proj.lora_scale == 4.0
    assert layer.attention.k_proj.lora_a is None


def test_a_fresh_adapter_changes_nothing() -> None:
    """B is zero; A is uniform in ±1/sqrt(fan-in), another draw for each layer and expert; the weights are the same."""
    lora = lora_of((("attention.q_proj", "ffn.up_proj"), 2, 4.0))
    ids, segments = np.arange(20, dtype=np.int32).reshape(2, 10), np.ones((2, 10), np.int32)

    @partial(jax.jit, static_argnums=0)
    def made(lora: config.Lora | None, *tokens: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        model = init_model(0, MODEL, config.Compute(), lora)
        return parameters(model)[1], model.logits(model(*tokens)[0])

    with jax.set_mesh(ONE):
        tokens = put_batch((ids, ids % 10, segments), ONE)
        (base, wanted), (both, found) = (jax.device_get(made(x, *tokens)) for x in (None, lora))
    np.testing.assert_array_equal(found, wanted)
    jax.tree.map(np.testing.assert_array_equal, {path: both[path] for path in base}, base)
    for path in both.keys() - base.keys():
        if path.endswith("lora_b"):
            assert not both[path].any(), path
        else:
            batch = 2 if ".ffn." in path else 1
            bound = np.prod(both[path].shape[batch:-1]) ** -0.5
            assert 0.8 * bound < np.max(np.abs(both[path])) <= bound, path
            draws = both[path].reshape(-1, np.prod(both[path].shape[batch:]))
            assert len(np.unique(draws, axis=0)) == len(draws), path


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (((("attention.w_proj",), 2, 4.0),), "'attention.w_proj' names no module; there are attention.k_proj, attention.o_proj"),
        (((("*.router",), 2, 4.0),), "'*.router' names no module"),
        (((("attention.*",), 2, 4.0), (("*.q_proj",), 4, 4.0)), "attention.q_proj is named twice, by 'attention.*' and '*.q_proj'"),
    ],
)
def test_patterns_that_cannot_be_meant(targets: Any, message: str) -> None:
    with jax.set_mesh(ONE), pytest.raises(ValueError) as error:
        abstract(lora_of(*targets))
    assert message in str(error.value) and "\n" not in str(error.value)


BY_EXPERT = {"rank": 2, "alpha": 4.0}


@pytest.mark.parametrize(
    ("targets", "train", "message"),
    [
        ([{"modules": ("attention.*",), "experts": (1,)}], (), "attention.k_proj has no experts; leave experts [1] out"),
        ([{"modules": ("ffn.*",), "experts": (4,)}], (), "ffn.down_proj has no expert 4; it has 4 experts, numbered from 0"),
        (
            [{"modules": ("ffn.*",), "experts": (1, 2)}, {"modules": ("ffn.up_proj",), "experts": (2,)}],
            (),
            "expert 2 of ffn.up_proj is named twice, by 'ffn.*' and 'ffn.up_proj'",
        ),
        ([{"modules": ("attention.*",)}], ("attention.q_proj",), "'attention.q_proj' names attention.q_proj, which has an adapter"),
        ([{"modules": ("attention.*",)}], ("*router",), "lora.train: pattern '*router' names no module"),
    ],
)
def test_experts_and_whole_modules_that_cannot_be_meant(targets: Any, train: Any, message: str) -> None:
    lora = config.Lora(targets=tuple(config.LoraTarget(**BY_EXPERT, **target) for target in targets), train=train)
    with jax.set_mesh(ONE), pytest.raises(ValueError) as error:
        abstract(lora)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_modules_of_latent_attention_and_shared_experts() -> None:
    targets = (config.LoraTarget(modules=("attention.*", "ffn.*_proj"), rank=2, alpha=4.0),)
    with jax.set_mesh(ONE):
        lora = config.Lora(targets=targets, train=("*_norm",), quantize=config.Int8(name="int8", block_size=2))
        arrays = parameters(abstract_model(MISTRAL4, config.Compute(param_dtype="bfloat16"), lora))[1]
    adapted = {ParameterPath.parse(path).module for path in arrays if path.endswith(".lora_a")}
    latents = {f"attention.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj", "o_proj")}
    routed = {f"ffn.{name}_proj" for name in ("gate", "up", "down")}
    assert adapted == latents | routed | {f"ffn.shared.{name}_proj" for name in ("gate", "up", "down")}
    assert arrays["stacks.1.layers.0.attention.kv_b_proj.lora_a"].shape == (2, 14, 2)
    assert arrays["stacks.1.layers.0.attention.kv_b_proj.lora_b"].shape == (2, 2, 4, 16)
    # Norms of latents are trained in full, in float32, and linear maps are quantized along what their product sums over.
    assert arrays["stacks.0.layers.0.attention.kv_a_norm.scale"].dtype == np.float32
    assert arrays["stacks.0.layers.0.attention.q_b_proj.weight.scales"].shape == (1, 6, 4, 18)


def test_a_tied_embedding_has_no_adapter() -> None:
    tied = MODEL.model_copy(update={"tie_embeddings": True})
    for lora, message in ((lora_of((("embed",), 2, 4.0)), "embed is tied to the head"), (lora_of((("head",), 2, 4.0)), "names no")):
        with jax.set_mesh(ONE), pytest.raises(ValueError, match=message):
            jax.eval_shape(partial(init_model, 0, tied, config.Compute(), lora))


def test_what_is_trained_in_full_is_float32() -> None:
    lora = config.Lora(targets=(config.LoraTarget(modules=("attention.*",), rank=2, alpha=4.0),), train=("ffn.router", "*_norm"))
    with jax.set_mesh(ONE):
        shapes = parameters(abstract_model(MODEL, config.Compute(param_dtype="bfloat16"), lora))[1]
    trainable, frozen = partition(shapes, lora)
    assert {x.dtype.name for x in trainable.values()} == {"float32"} and {x.dtype.name for x in frozen.values()} == {"bfloat16"}
    assert "stacks.0.layers.0.ffn.router.weight" in trainable and "final_norm.scale" in trainable


def test_an_expert_may_differ_or_have_none() -> None:
    """Arrays of the largest rank; past its own an expert's A is zero, and its scale is its own."""
    lora = config.Lora(
        targets=(
            config.LoraTarget(modules=("ffn.up_proj",), rank=3, alpha=6.0, experts=(0, 3)),
            config.LoraTarget(modules=("ffn.up_proj",), rank=2, alpha=6.0, experts=(1,)),
        ),
        rslora=True,
    )
    with jax.set_mesh(ONE):
        assert abstract(lora).stacks[0].layers[0].ffn.up_proj.lora_scale == (
            *((6 / 3**0.5, 3), (6 / 2**0.5, 2), (0.0, 0), (6 / 3**0.5, 3)),
        )
        a = jax.jit(lambda: parameters(init_model(0, MODEL, config.Compute(), lora))[1])()["stacks.0.layers.0.ffn.up_proj.lora_a"]
        a = np.asarray(a)
    for e, rank in enumerate((3, 2, 0, 3)):
        assert a[:, e, :, :rank].all() and not a[:, e, :, rank:].any()


EVERY_KIND = config.Lora(
    targets=(
        config.LoraTarget(modules=("attention.*", "head"), rank=2, alpha=3.0),
        config.LoraTarget(modules=("ffn.router", "embed"), rank=3, alpha=3.0),
        config.LoraTarget(modules=("ffn.*",), rank=3, alpha=6.0, experts=(0, 3)),
        config.LoraTarget(modules=("ffn.*",), rank=2, alpha=1.0, experts=(1,)),
    ),
    dropout=0.3,
    train=("*_norm",),
)


def filled(mesh: Mesh) -> tuple[Any, Parameters]:
    """Structure and random weights, adapters included; zeros past the rank of an expert, as training leaves them."""
    structure, shapes = parameters(abstract(EVERY_KIND))
    rng, found = np.random.default_rng(0), {}
    for path, like in shapes.items():
        x = rng.normal(path.endswith(".scale"), 0.3, like.shape).astype(np.float32)
        if ".ffn." in path and ParameterPath.parse(path).is_adapter and "router" not in path:
            for e, rank in enumerate((3, 2, 0, 3)):
                x[(slice(None), e, ..., slice(rank, None)) if path.endswith("_a") else (slice(None), e, slice(rank, None))] = 0
        found[path] = jax.device_put(x, NamedSharding(mesh, like.sharding.spec))
    return structure, found


TOKENS = np.random.default_rng(1).integers(0, 24, (8, 10)).astype(np.int32)
BATCH = Batch(TOKENS, np.roll(TOKENS, -1, 1), TOKENS % 5 > 0, np.ones_like(TOKENS), np.tile(np.arange(10, dtype=np.int32), (8, 1)))


def loss_and_gradients(mesh: Mesh) -> Any:
    """With dropout; of everything that is trained."""
    with jax.set_mesh(mesh):
        structure, params = filled(mesh)
        trainable, frozen = partition(params, EVERY_KIND)

        @jax.jit
        def run(trainable: Parameters, frozen: Parameters, batch: Any) -> Any:
            key = jax.random.key(5, impl="threefry2x32")
            coefs = config.Loss(load_balance_loss_coef=0.1, router_z_loss_coef=0.0)
            definition = StepDefinition(structure, next_token(), optax.identity(), coefs)
            result = step_gradients(definition, trainable, ModelWeights({}, frozen, {}), batch, key)
            return result.loss, result.gradients

        return jax.device_get(run(trainable, frozen, put_batch(BATCH, mesh)))


def test_every_kind_of_adapter_is_the_same_on_every_mesh() -> None:
    """Loss and gradients, dropout and its masks included; nothing moves past the rank of an expert."""
    (loss, grads), (wanted_loss, wanted) = loss_and_gradients(EIGHT), loss_and_gradients(ONE)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert {path.removeprefix("stacks.0.layers.0.") for path in grads if not ParameterPath.parse(path).is_adapter} == {
        "attention_norm.scale",
        "ffn_norm.scale",
        "final_norm.scale",
    }
    for path, g in grads.items():
        assert np.max(np.abs(g - wanted[path])) <= 2e-4 * np.max(np.abs(wanted[path])), path
        assert g.any(), path
        if ".ffn." in path and ParameterPath.parse(path).is_adapter and "router" not in path:
            for e, rank in enumerate((3, 2, 0, 3)):
                assert not (g[:, e, ..., rank:] if path.endswith("_a") else g[:, e, rank:]).any(), path


def test_every_kind_of_adapter_is_the_merged_weight() -> None:
    """Without a key there is no dropout: the same logits as without adapters, with each delta added to its weight."""

    @partial(jax.jit, static_argnums=0)
    def logits(structure: Any, params: Parameters, *tokens: jax.Array) -> jax.Array:
        model = combine(structure, params)
        return model.logits(model(*tokens)[0])

    with jax.set_mesh(ONE):
        tokens = put_batch((BATCH.tokens, BATCH.positions, BATCH.segment_ids), ONE)
        structure, params = filled(ONE)
        found = logits(structure, params, *tokens)
        merged = {}
        for path, w in ((path, x) for path, x in params.items() if not ParameterPath.parse(path).is_adapter):
            module = path.removesuffix(".weight")
            if f"{module}.lora_a" in params:
                a, b = (np.asarray(params[f"{module}.{x}"]) for x in ("lora_a", "lora_b"))
                if "_proj" in module and ".ffn." in module:
                    delta = np.einsum("LEiJ,LEJo,E->LEio", a, b, [2.0, 0.5, 0.0, 2.0])
                elif module.startswith("stacks"):
                    scale = 1.0 if "router" in module else 1.5
                    delta = scale * np.stack([np.tensordot(x, y, 1) for x, y in zip(a, b, strict=True)])
                else:
                    delta = a @ b if module == "embed" else 1.5 * (a @ b).T
                w = jax.device_put(np.asarray(w) + delta.astype(np.float32), w.sharding)
            merged[path] = w
        plain = parameters(abstract_model(MODEL, config.Compute()))[0]
        wanted = logits(plain, merged, *tokens)
    assert np.max(np.abs(found - wanted)) <= 1e-4 * np.max(np.abs(wanted))


def test_dropout_zeroes_a_share_and_keeps_the_mean() -> None:
    """Of a linear map's input (global view) and of an expert's (local view)."""
    x, key = jax.numpy.ones((64, 100)), jax.random.key(0, impl="threefry2x32")
    with jax.set_mesh(ONE):
        linear = abstract(EVERY_KIND).stacks[0].layers[0].attention.q_proj
        dropped = [linear.apply_dropout(x, key), _drop(key, 0.3, jax.numpy.arange(64, dtype=np.uint32), x, 0)]
        assert np.array_equal(linear.apply_dropout(x, None), x)
        # half of the columns are the same half, wherever they are
        half = _drop(key, 0.3, jax.numpy.arange(64, dtype=np.uint32), x[:, 50:], 50)
        assert np.array_equal(half, dropped[1][:, 50:])
    for y in map(np.asarray, dropped):
        assert set(np.unique(y)) == {0, np.float32(1 / 0.7)}
        assert abs(np.mean(y == 0) - 0.3) < 0.02 and 0 < np.std(np.mean(y == 0, axis=0)) < 0.1
