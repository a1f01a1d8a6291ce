"""transformers as judge of pictures: features, logits and gradients through vision wrappers, packed and on any mesh."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train import config
from moe_train.commands.export import ExportOptions, export
from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.data.batches.batch import StoredPiece
from moe_train.data.batches.media_batch import MediaBatch, media_batch
from moe_train.data.media import MediaOfPiece
from moe_train.data.pictures.patches import patched
from moe_train.data.pictures.rules import PictureRules
from moe_train.machine.mesh import make_mesh, put_batch
from moe_train.model import parameters as flat
from moe_train.model.paths import ParameterPath
from moe_train.model.transformer import abstract_model
from moe_train.proof.prove_adapter import AdapterExport, prove_adapter
from moe_train.train.objectives.next_token import media_of
from moe_train.weights import external, names, peft
from moe_train.weights.wrappers import vision_pieces
from tests.judges.test_transformers_and_peft import distance
from tests.judges.test_wrappers import PLACEHOLDER, read_wrapper, wrapper

pytestmark = pytest.mark.judges

ROWS = 4
SEQ_LEN = 64
PATCHES = 64
SIZES = ((56, 56), (28, 56))
"""Height and width of two pictures."""
KINDS = [("mistral3", "mistral"), ("mistral3", "ministral3"), ("mistral3", "mistral4"), ("llava", "mistral")]


class Packed(NamedTuple):
    """A batch of rows, of which the first has three segments: a picture, none, a picture."""

    batch: MediaBatch
    segments: list[tuple[np.ndarray, np.ndarray | None]]
    """Tokens and pixels of each segment of the first row."""


def packed(encoder: config.VisionEncoder) -> Packed:
    draw = np.random.default_rng(5)
    rules = PictureRules(encoder.patch_size, encoder.cell_size, encoder.max_image_size, PLACEHOLDER, 12, 13)
    batch = media_batch(encoder, PATCHES).empty(ROWS, SEQ_LEN)
    segments: list[tuple[np.ndarray, np.ndarray | None]] = []
    pieces = []
    for size, length in zip((SIZES[0], None, SIZES[1]), (24, 11, 22), strict=True):
        tokens = draw.integers(14, 126, length)
        pixels = None
        pictures = None
        if size is not None:
            pixels = draw.normal(size=(3, *size)).astype(np.float32)
            ids = rules.tokens(rules.grid(size[1], size[0]))
            tokens[2 : 2 + len(ids)] = ids
            patches, places = patched(pixels, rules)
            pictures = MediaOfPiece(patches, places, np.ones(len(patches), np.int32), PLACEHOLDER)
        segments.append((tokens, pixels))
        pieces.append(StoredPiece(tokens, np.ones(length, bool), media=pictures))
    batch.fill_row(0, pieces)
    for row in range(1, ROWS):  # the same again, in another order
        batch.fill_row(row, pieces[1:])
    return Packed(batch, segments)


class Ours(NamedTuple):
    features: np.ndarray
    logits: np.ndarray
    gradients: dict[str, np.ndarray]


def ours(base: Path, encoder: config.VisionEncoder, batch: Any, mesh: jax.sharding.Mesh) -> Ours:
    with jax.set_mesh(mesh):
        model = external.read_external_model(base)
        structure, shapes = flat.parameters(abstract_model(model, config.Compute(), None, encoder))
        weights = external.load_external_parameters(base, shapes)
        placed = put_batch(batch, mesh)

        def loss(weights: dict[str, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            module = flat.combine(structure, weights)
            pictures = media_of(placed)
            hidden, _ = module(placed.tokens, placed.positions, placed.segment_ids, media=pictures)
            logits = module.logits(hidden)
            chosen = jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(placed.targets, model.vocab_size), axis=-1)
            features = module.vision(pictures.placed())
            is_first = placed.loss_mask & (np.arange(ROWS) == 0)[:, None]
            return -jnp.sum(jnp.where(is_first, chosen, 0)), (features, logits)

        (_, (features, logits)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights)
        return Ours(np.asarray(features), np.asarray(logits), {path: np.asarray(x) for path, x in gradients.items()})


@pytest.mark.parametrize(("kind", "text"), KINDS)
def test_features_logits_and_gradients_equal_transformers(kind: str, text: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    judge = wrapper(kind, text)
    judge.save_pretrained(tmp_path / "base")
    encoder = external.read_encoder(tmp_path / "base", config.VisionEncoder)
    batch, segments = packed(encoder)
    total = 0.0
    features, logits = [], []
    for tokens, pixels in segments:
        inputs: dict[str, Any] = {}
        if pixels is not None:
            inputs["pixel_values"] = torch.tensor(pixels)[None]
            inputs["image_sizes"] = torch.tensor([pixels.shape[1:]])
            with torch.no_grad():
                features.append(judge.model.get_image_features(**inputs).pooler_output[0].numpy())
        output = judge(input_ids=torch.tensor(tokens)[None], **inputs).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(output, torch.tensor(tokens[1:]), reduction="sum")
        logits.append(output.detach().numpy())
    total.backward()
    theirs = {name.removeprefix("model."): x.grad.numpy() for name, x in judge.named_parameters() if x.grad is not None}
    files = external.open_external_weights(tmp_path / "base")
    assert files.carried is not None
    pieces = vision_pieces.pieces_of(files.carried, files.model)
    assert {piece.name for piece in pieces} == {name for name in theirs if not name.startswith(("language_model.", "lm_head."))}
    meshes = [make_mesh(config.Mesh(), jax.devices()[:1])]
    if text != "mistral4":
        meshes.append(make_mesh(config.Mesh(fsdp=2, context=2, tensor=2)))
    for mesh in meshes:
        found = ours(tmp_path / "base", encoder, batch, mesh)
        expected = np.concatenate(features)
        assert distance(found.features[0, : len(expected)], expected) < 1e-5
        expected = np.concatenate(logits)
        assert distance(found.logits[0, : len(expected)], expected) < 1e-4
        assert distance(found.gradients["embed.weight"], theirs["language_model.embed_tokens.weight"]) < 1e-3
        for piece in pieces:  # gradients are laid out in files as their weights are
            gradient = piece.to_file(found.gradients[piece.path][piece.lead])
            assert distance(gradient, theirs[piece.name]) < 1e-3, piece.name


ADAPTED = config.Lora(
    targets=(
        config.LoraTarget(modules=("attention.*",), rank=4, alpha=8.0),
        config.LoraTarget(modules=("vision.tower.layers.attention.*", "vision.tower.patch_proj"), rank=2, alpha=3.0),
        config.LoraTarget(modules=("vision.projector.in_proj",), rank=3, alpha=4.0),
    ),
    train=("*_norm", "vision.projector.out_proj", "vision.tower.layers.ffn.*", "vision.tower.layers.ffn_norm"),
)
"""Adapters of three shapes, and modules in full, in both parts."""
OF_TOWER = config.Lora(targets=(config.LoraTarget(modules=("vision.tower.layers.ffn.up_proj",), rank=2, alpha=3.0),))


@pytest.mark.parametrize(("kind", "lora"), [("mistral3", ADAPTED), ("llava", ADAPTED), ("mistral3", OF_TOWER)])
def test_an_adapter_of_the_tower_works_in_peft(kind: str, lora: config.Lora, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    PeftModel = pytest.importorskip("peft").PeftModel
    wrapper(kind, "mistral").save_pretrained(tmp_path / "base")
    encoder = external.read_encoder(tmp_path / "base", config.VisionEncoder)
    batch, segments = packed(encoder)
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        model = external.read_external_model(tmp_path / "base")
        structure, shapes = flat.parameters(abstract_model(model, config.Compute(), lora, encoder))
        frozen = {path: like for path, like in shapes.items() if not ParameterPath.parse(path).is_trained(lora)}
        weights = external.load_external_parameters(tmp_path / "base", frozen)
        draw = np.random.default_rng(8)
        for path, like in shapes.items():
            if path not in weights:
                weights[path] = jnp.asarray(draw.normal(0, 0.3, like.shape), like.dtype)
        module = flat.combine(structure, weights)
        hidden, _ = module(batch.tokens, batch.positions, batch.segment_ids, media=media_of(batch))
        ours = np.asarray(module.logits(hidden))[0]
        peft.export_adapter(weights, model, lora, tmp_path / "adapter", base_model="base", layout=names.WRAPPED, encoder=encoder)
        prove_adapter(
            AdapterExport(tmp_path / "adapter", "peft", weights, model, lora, None, None, base=tmp_path / "base", encoder=encoder)
        )
        # Read again, from the names on the wrapper.
        section = peft.read_lora(tmp_path / "adapter", model, encoder)
        likes = {path: like for path, like in shapes.items() if ParameterPath.parse(path).is_trained(section)}
        read = peft.load_adapter(tmp_path / "adapter", model, likes, encoder)
        assert read.keys() == shapes.keys() - frozen.keys()
        assert all(np.array_equal(read[path], weights[path]) for path in read)

    def logits_of(judge: Any) -> np.ndarray:
        outputs = []
        for tokens, pixels in segments:
            inputs: dict[str, Any] = {}
            if pixels is not None:
                inputs = {"pixel_values": torch.tensor(pixels)[None], "image_sizes": torch.tensor([pixels.shape[1:]])}
            with torch.no_grad():
                outputs.append(judge(input_ids=torch.tensor(tokens)[None], **inputs).logits[0, :-1].numpy())
        return np.concatenate(outputs)

    judge = PeftModel.from_pretrained(read_wrapper(kind, tmp_path / "base"), tmp_path / "adapter").eval()
    expected = logits_of(judge)
    assert distance(ours[: len(expected)], expected) < 1e-4
    assert distance(logits_of(judge.merge_and_unload()), expected) < 1e-4
    assert distance(logits_of(read_wrapper(kind, tmp_path / "base")), expected) > 0.01


def test_native_files_give_the_same_tower(tmp_path: Path) -> None:
    base = tmp_path / "base"
    wrapper("mistral3", "mistral", vocab_size=300).save_pretrained(base)
    train_tokenizer(["some text to learn from"] * 5, 270, tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").iterdir():
        shutil.copyfile(file, base / file.name)
    export(base, tmp_path / "native", "mistral", options=ExportOptions(depth="tensors"))
    encoders = [external.read_encoder(path, config.VisionEncoder) for path in (base, tmp_path / "native")]
    # Mistral's own layout does not state the constant of the projector's norm.
    assert encoders[0].model_copy(update={"projector_norm_eps": 1e-5}) == encoders[1]
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        model = external.read_external_model(base)
        shapes = flat.parameters(abstract_model(model, config.Compute(), None, encoders[0]))[1]
        tower = {path: like for path, like in shapes.items() if ParameterPath.parse(path).is_vision}
        ours, native = (external.load_external_parameters(path, tower) for path in (base, tmp_path / "native"))
    assert len(tower) == 15
    for path in tower:
        assert np.array_equal(np.asarray(ours[path]), np.asarray(native[path])), path
