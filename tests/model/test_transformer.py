"""The whole model: the same numbers on every mesh, stacked layers, rematerialisation, tied tables, decoding, packing."""

from __future__ import annotations

import re
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding

from moe_train import config
from moe_train.data.batches.batch import Batch
from moe_train.machine.mesh import make_mesh, put_batch
from moe_train.model.attention.places import TokenPlaces
from moe_train.model.parameters import combine, parameters
from moe_train.model.transformer import abstract_model, empty_caches, init_model
from moe_train.train.gradients import StepGradients, step_gradients
from moe_train.train.objectives.next_token import next_token
from moe_train.train.objectives.objective import ModelWeights
from moe_train.train.step_definition import StepDefinition
from tests.model.attention.shared_prompts import random_rows
from tests.tiny import DEEPSEEK_V3, MISTRAL4, ONE

B, T, V = 8, 16, 32
ATTENTION = config.GroupedQueryAttention(num_heads=8, num_kv_heads=4, head_dim=4)
MIXTRAL = config.Model(
    family="mixtral",
    vocab_size=V,
    model_dim=16,
    num_layers=2,
    attention=ATTENTION,
    ffn=config.MoeFfn(name="moe", ffn_dim=24, num_experts=8, experts_per_token=2),
)

DENSE_FIRST = MIXTRAL.ffn.model_copy(update={"dense_layers": config.DenseLayers(count=2, ffn_dim=40)})


def windows(*period: int | None) -> config.Attention:
    return ATTENTION.model_copy(update={"windows": period})


MISTRAL = MIXTRAL.model_copy(
    update={"family": "mistral", "ffn": config.DenseFfn(name="dense", ffn_dim=24), "attention": windows(5)}
)
LORA = config.Lora(
    targets=(
        config.LoraTarget(modules=("attention.*",), rank=3, alpha=6.0),
        config.LoraTarget(modules=("ffn.*",), rank=2, alpha=6.0),
    )
)
LOSS = config.Loss(load_balance_loss_coef=0.5, router_z_loss_coef=0.1)
MESHES = {
    "data": config.Mesh(data=8),
    "fsdp": config.Mesh(fsdp=8),
    "expert": config.Mesh(expert=8),
    "data, tensor": config.Mesh(data=2, tensor=4),
    "data, fsdp, expert": config.Mesh(data=2, fsdp=2, expert=2),
    "fsdp, expert, tensor": config.Mesh(fsdp=2, expert=2, tensor=2),
    "data, expert, tensor": config.Mesh(data=2, expert=2, tensor=2),
    "context, fsdp, expert": config.Mesh(fsdp=2, expert=2, context=2),
    "context, data, tensor": config.Mesh(data=2, context=2, tensor=2),
    "context, expert": config.Mesh(expert=4, context=2),
    "context, fsdp": config.Mesh(fsdp=2, context=4),
}


def batch() -> Batch:
    """Two segments and some padding in each row, of another length in each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    segments, positions = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for b in range(B):
        first, end = 3 + b % 5, T - b % 3
        segments[b, :first], segments[b, first:end] = 1, 2
        positions[b, :end] = np.r_[np.arange(first), np.arange(end - first)]
    return Batch(tokens, np.roll(tokens, -1, 1), (rng.random((B, T)) < 0.7) & (segments > 0), segments, positions)


@cache
def weights(model: config.Model, lora: config.Lora | None = None) -> dict[str, np.ndarray]:
    """Far from zero, so that every part matters; adapters too."""
    with jax.set_mesh(ONE):
        _, like = abstract(model, lora)
    rng = np.random.default_rng(1)
    return {path: rng.normal(path.endswith(".scale"), 0.3, x.shape).astype(x.dtype) for path, x in like.items()}


def abstract(model: config.Model, lora: config.Lora | None = None, **compute: Any) -> tuple[Any, dict[str, Any]]:
    return parameters(abstract_model(model, config.Compute(**compute), lora))


def placed(params: dict[str, np.ndarray], like: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    return {path: jax.device_put(params[path], NamedSharding(mesh, x.sharding.spec)) for path, x in like.items()}


def all_gradients(params: dict[str, jax.Array], batch: Batch, structure: Any) -> StepGradients:
    is_sparse = any(".router." in path for path in params)
    definition = StepDefinition(structure, next_token(), optax.identity(), LOSS if is_sparse else config.Loss())
    return step_gradients(definition, params, ModelWeights({}, {}, {}), batch, None)


def loss_and_gradients(model: config.Model, mesh: Mesh, lora: config.Lora | None = None, **compute: Any) -> tuple[Any, Any]:
    """(loss and its parts, gradients of every weight) on the host."""
    with jax.set_mesh(mesh):
        structure, like = abstract(model, lora, **compute)
        run = jax.jit(partial(all_gradients, structure=structure))
        *parts, gradients = jax.device_get(run(placed(weights(model, lora), like, mesh), put_batch(batch(), mesh)))
        return parts, gradients


@cache
def on_one_device(model: config.Model) -> tuple[Any, Any]:
    return loss_and_gradients(model, ONE)


def check_equal(found: tuple[Any, Any], wanted: tuple[Any, Any], tolerance: float = 2e-5) -> None:
    """Loss, router figures, and each layer's gradient of each weight (of each expert), relative to its own size."""
    (found_loss, found_grads), (wanted_loss, wanted_grads) = found, wanted
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found_loss, wanted_loss)
    assert found_grads.keys() == wanted_grads.keys()
    for path, b in wanted_grads.items():
        parts = 2 if re.search(r"ffn.*_proj", path) and b.ndim == 4 else 1 if path.startswith("stacks") else 0
        a, b = (g.reshape(*g.shape[:parts], -1) for g in (found_grads[path], b))
        error, scale = np.max(np.abs(a - b), axis=-1), np.max(np.abs(b), axis=-1)
        has_gradient = np.max(scale) > 0 or path.endswith("router.bias")
        assert has_gradient and (error <= tolerance * scale).all(), f"{path}: {error} beside {scale}"


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_equals_one_device(mesh: str) -> None:
    check_equal(loss_and_gradients(MIXTRAL, make_mesh(MESHES[mesh])), on_one_device(MIXTRAL))


def test_full_rematerialisation_and_plain_kernels_change_nothing() -> None:
    mesh = make_mesh(config.Mesh(fsdp=4, expert=2))
    found = loss_and_gradients(MIXTRAL, mesh, remat="full", attention="reference", grouped_matmul="reference")
    check_equal(found, on_one_device(MIXTRAL))


def test_permuted_devices() -> None:
    devices = [jax.devices()[i] for i in (3, 1, 7, 0, 6, 2, 5, 4)]
    mesh = make_mesh(MESHES["fsdp, expert, tensor"], devices)
    check_equal(loss_and_gradients(MIXTRAL, mesh), on_one_device(MIXTRAL))


def test_adapters_on_a_mesh() -> None:
    meshes = [make_mesh(sizes) for sizes in (MESHES["fsdp, expert, tensor"], config.Mesh(expert=2, context=2, tensor=2))]
    *found, wanted = (loss_and_gradients(MIXTRAL, m, LORA, grouped_matmul="reference") for m in (*meshes, ONE))
    for one in found:
        check_equal(one, wanted)


@pytest.mark.parametrize(
    "sizes", [config.Mesh(data=2, fsdp=2, tensor=2), config.Mesh(context=4, tensor=2)], ids=["rows", "context"]
)
def test_dense_model_on_a_mesh(sizes: config.Mesh) -> None:
    """Its window is wider than what a device has of a sequence, where `context` splits it."""
    check_equal(loss_and_gradients(MISTRAL, make_mesh(sizes)), on_one_device(MISTRAL))


@pytest.mark.parametrize(
    ("model", "mesh"),
    [(DEEPSEEK_V3, "fsdp, expert, tensor"), (MISTRAL4, "context, fsdp, expert")],
    ids=["deepseek_v3", "mistral4"],
)
@pytest.mark.slow
def test_adapters_on_latents_on_a_mesh(model: config.Model, mesh: str) -> None:
    """Latent attention, shared experts and dense first layers, with an adapter beside every linear map."""
    # Gradients of these larger products of four matrices differ more by the order of sums.
    check_equal(loss_and_gradients(model, make_mesh(MESHES[mesh]), LORA), loss_and_gradients(model, ONE, LORA), 1e-4)


def test_weights_are_the_same_on_every_mesh() -> None:
    shape = {"num_layers": 1, "attention": ATTENTION.model_copy(update={"num_heads": 2, "num_kv_heads": 2})}
    model = MISTRAL.model_copy(update=shape)
    made = []
    for mesh in (ONE, make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))):
        with jax.set_mesh(mesh):
            made.append(jax.device_get(parameters(jax.jit(lambda: init_model(0, model, config.Compute()))())[1]))
    jax.tree.map(np.testing.assert_array_equal, *made)


@pytest.mark.parametrize("name", ["fsdp, expert, tensor", "data, fsdp, expert"])
def test_an_abstract_model_has_the_shapes_and_shardings_of_a_random_one(name: str) -> None:
    lora = LORA.model_copy(update={"train": ("ffn.router",)})
    with jax.set_mesh(make_mesh(MESHES[name])):
        made = jax.eval_shape(partial(init_model, 0, MISTRAL4, config.Compute(param_dtype="bfloat16"), lora))
        abstract = abstract_model(MISTRAL4, config.Compute(param_dtype="bfloat16"), lora)
    assert parameters(abstract) == parameters(made)


def lowered(num_layers: int, remat: str) -> str:
    model, mesh = MIXTRAL.model_copy(update={"num_layers": num_layers}), make_mesh(MESHES["fsdp, expert, tensor"])
    with jax.set_mesh(mesh):
        structure, like = abstract(model, remat=remat)
        run = jax.jit(partial(all_gradients, structure=structure))
        return run.lower(placed(weights(model), like, mesh), put_batch(batch(), mesh)).as_text()


@pytest.mark.parametrize("remat", ["minimal", "full"])
def test_the_program_does_not_grow_with_depth(remat: str) -> None:
    shallow, deep = lowered(2, remat), lowered(16, remat)
    assert shallow.count("\n") > 500
    assert shallow.count("\n") == deep.count("\n")


@pytest.mark.parametrize(("kernel", "slices"), [("auto", False), ("reference", True)])
def test_one_device_does_not_slice_all_experts_of_a_layer(kernel: str, slices: bool) -> None:
    """The slice would be a copy, forward and backward, of each of the three matrices."""
    with jax.set_mesh(ONE):
        structure, like = abstract(MIXTRAL, grouped_matmul=kernel)
        run = jax.jit(partial(all_gradients, structure=structure))
        program = run.lower(placed(weights(MIXTRAL), like, ONE), put_batch(batch(), ONE)).compile().as_text()
    assert bool(re.search(r"f32\[1,8,(16,24|24,16)\]\S* dynamic-slice\(", program)) == slices


def unstacked(model: Any, batch: Batch) -> tuple[jax.Array, Any]:
    """The same layers, one after the other: layer i * period + j of stack s is entry i of stacks.s.layers.j."""
    x, stats = model.embed(batch.tokens, model.dtype), []
    places, rotation = TokenPlaces(batch.positions, batch.segment_ids), model.rotation(batch.positions)
    for stack in model.stacks:
        for i in range(len(jax.tree.leaves(stack.layers[0])[0])):
            for layers in stack.layers:
                x, _, s = jax.tree.map(lambda w, i=i: w[i], layers)(x, places, rotation)
                stats += [] if s is None else [s]
    return model.final_norm(x), jax.tree.map(lambda *xs: jnp.stack(xs), *stats) if stats else None


@pytest.mark.parametrize(
    ("model", "kernel"),
    [
        (MISTRAL.model_copy(update={"family": "ministral", "num_layers": 4, "attention": windows(3, None)}), "reference"),
        (MIXTRAL.model_copy(update={"num_layers": 4, "attention": windows(3, 3)}), "reference"),
        (MIXTRAL.model_copy(update={"num_layers": 4, "attention": windows(3, 3)}), "blocked"),
        (MIXTRAL.model_copy(update={"num_layers": 4, "ffn": DENSE_FIRST}), "reference"),
    ],
    ids=[
        "interleaved windows",
        "a period of two sparse layers",
        "a period of two sparse layers, whose experts are read in the stack",
        "two dense layers, then sparse ones",
    ],
)
def test_stacked_layers_equal_single_ones(model: config.Model, kernel: str) -> None:
    def both(params: dict[str, jax.Array], batch: Batch) -> Any:
        def stacked(p: Any) -> Any:
            hidden, stats = combine(structure, p)(batch.tokens, batch.positions, batch.segment_ids)
            return jnp.sum(jnp.sin(hidden)), (hidden, stats)

        def single(p: Any) -> Any:
            hidden, stats = unstacked(combine(structure, p), batch)
            return jnp.sum(jnp.sin(hidden)), (hidden, stats)

        return tuple(jax.value_and_grad(f, has_aux=True)(params) for f in (stacked, single))

    with jax.set_mesh(ONE):
        structure, like = abstract(model, grouped_matmul=kernel)
        found, wanted = jax.device_get(jax.jit(both)(placed(weights(model), like, ONE), put_batch(batch(), ONE)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.max(np.abs(b)))


def test_the_gradient_of_a_tied_table_is_the_sum_of_both_uses() -> None:
    untied = MISTRAL.model_copy(update={"num_layers": 1})
    tied = untied.model_copy(update={"tie_embeddings": True})
    both = {**weights(tied), "head.weight": weights(tied)["embed.weight"]}
    with jax.set_mesh(ONE):
        grads = []
        for model in (untied, tied):
            structure, like = abstract(model)
            run = jax.jit(partial(all_gradients, structure=structure))
            grads.append(jax.device_get(run(placed(both, like, ONE), put_batch(batch(), ONE))).gradients)
    wanted, found = grads
    assert "head.weight" not in found
    np.testing.assert_allclose(found["embed.weight"], wanted["embed.weight"] + wanted["head.weight"], rtol=1e-5, atol=1e-6)


@cache
def forward(model: config.Model, mesh: Mesh) -> Any:
    """(params, batch) -> logits, with `params` placed."""
    with jax.set_mesh(mesh):
        structure, like = abstract(model)

        @jax.jit
        def run(params: Any, batch: Batch) -> jax.Array:
            transformer = combine(structure, params)
            return transformer.logits(transformer(batch.tokens, batch.positions, batch.segment_ids)[0])

        return structure, placed(weights(model), like, mesh), run


def test_packed_sequences_equal_separate_ones() -> None:
    """Each segment alone in its row, from position 0, gives the logits that it gives packed."""
    packed = batch()
    alone = [np.zeros_like(x) for x in packed]
    for b in range(B):
        second = packed.segment_ids[b] == 2
        for x, of_packed in zip(alone, packed, strict=True):
            x[b, : second.sum()] = of_packed[b, second]
    with jax.set_mesh(ONE):
        _, params, run = forward(MIXTRAL, ONE)
        a, b = (jax.device_get(run(params, put_batch(x, ONE))) for x in (packed, Batch(*alone)))
    for row in range(B):
        second = packed.segment_ids[row] == 2
        np.testing.assert_allclose(a[row, second], b[row, : second.sum()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (MIXTRAL, "fsdp, expert, tensor"),
        (MISTRAL, None),
        (MISTRAL, "context, data, tensor"),
        (MISTRAL4, "fsdp, expert, tensor"),
        pytest.param(MISTRAL4, "context, data, tensor", marks=pytest.mark.slow),
    ],
    ids=["mixtral on a mesh", "mistral with a window", "a cache on two devices", "latents", "latents on two devices"],
)
def test_decoding_equals_the_whole_sequence(model: config.Model, sizes: str | None) -> None:
    """A prompt of another length in each row, then token by token."""
    mesh = ONE if sizes is None else make_mesh(MESHES[sizes])
    tokens = batch().tokens
    whole = Batch(tokens, tokens, tokens > -1, np.ones_like(tokens), np.tile(np.arange(T, dtype=np.int32), (B, 1)))
    prompt, length = 6, 3 + np.arange(B) % 4
    with jax.set_mesh(mesh):
        structure, params, run = forward(model, mesh)
        wanted = jax.device_get(run(params, put_batch(whole, mesh)))

        def logits_and_caches(p: Any, tokens: jax.Array, positions: jax.Array, caches: Any) -> Any:
            transformer = combine(structure, p)
            hidden, caches = transformer.decode(tokens, positions, caches)
            return transformer.logits(hidden), caches

        decode = jax.jit(logits_and_caches)
        caches = jax.jit(lambda: empty_caches(combine(structure, params), model, B, T, jnp.dtype("float32")))()
        positions = np.where(np.arange(prompt) < length[:, None], np.arange(prompt), -1).astype(np.int32)
        logits, caches = decode(params, *put_batch((tokens[:, :prompt], positions), mesh), caches)
        for b in range(B):
            np.testing.assert_allclose(jax.device_get(logits)[b, : length[b]], wanted[b, : length[b]], rtol=1e-4, atol=1e-4)
        for step in range(5):
            at = (length + step)[:, None].astype(np.int32)
            token = np.take_along_axis(tokens, at, 1)
            padding = ((0, 0), (0, mesh.shape["context"] - 1))
            parts = np.pad(token, padding), np.pad(at, padding, constant_values=-1)
            logits, caches = decode(params, *put_batch(parts, mesh), caches)
            found = jax.device_get(logits)[:, 0]
            np.testing.assert_allclose(found, np.take_along_axis(wanted, at[..., None], 1)[:, 0], rtol=1e-4, atol=1e-4)


INTERLEAVED = MISTRAL.model_copy(update={"family": "ministral", "attention": windows(None, 5)})


@pytest.mark.parametrize(
    ("model", "kernel"),
    [
        pytest.param(MISTRAL4, "blocked", marks=pytest.mark.slow),
        pytest.param(DEEPSEEK_V3, "reference", marks=pytest.mark.slow),
        (INTERLEAVED, "blocked"),
        pytest.param(MIXTRAL, "reference", marks=pytest.mark.slow),
    ],
    ids=["mistral4", "deepseek_v3", "interleaved windows", "mixtral"],
)
def test_texts_that_continue_one_prompt_are_what_each_is_alone(model: config.Model, kernel: Any) -> None:
    rows = random_rows(2, 48, 12)
    tokens = np.random.default_rng(2).integers(0, model.vocab_size, rows.segments.shape)
    plain_tokens = np.take_along_axis(tokens, np.maximum(rows.source, 0), 1)
    counts = np.stack([np.bincount(of_row[of_row >= 0], minlength=48) for of_row in rows.source])
    compute = config.Compute(grouped_matmul="reference", attention=kernel)
    with jax.set_mesh(ONE):
        structure, weights = parameters(init_model(0, model, compute))
        factors = np.random.default_rng(3).normal(size=(*tokens.shape, model.model_dim)).astype(np.float32)

        def shared(weights: Any) -> Any:
            hidden, _ = combine(structure, weights)(tokens, rows.positions, rows.segments, prompt_ids_BT=rows.prompts)
            # A prompt's token counts as often as there are texts with it.
            return jnp.sum(hidden * factors * counts[..., None]), hidden

        def plain(weights: Any) -> Any:
            hidden, _ = combine(structure, weights)(plain_tokens, rows.plain_positions, rows.plain_segments)
            of_place = np.take_along_axis(factors, np.maximum(rows.source, 0)[..., None], 1)
            return jnp.sum(hidden * of_place * (rows.source >= 0)[..., None]), hidden

        (_, actual), gradients = jax.jit(jax.value_and_grad(shared, has_aux=True))(weights)
        (_, expected), plain_gradients = jax.jit(jax.value_and_grad(plain, has_aux=True))(weights)
    of_texts = np.take_along_axis(np.asarray(actual), np.maximum(rows.source, 0)[..., None], 1)
    assert (rows.prompts != rows.segments).sum() > 20
    np.testing.assert_allclose(of_texts[rows.source >= 0], np.asarray(expected)[rows.source >= 0], rtol=1e-4, atol=1e-5)
    for path, b in plain_gradients.items():
        assert np.max(np.abs(gradients[path] - b)) <= 1e-4 * np.max(np.abs(b)), path
