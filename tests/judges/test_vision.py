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
from moe_train.data.batches.picture_batch import PictureBatch, picture_batch
from moe_train.data.pictures.patches import PicturesOfPiece, patched
from moe_train.data.pictures.rules import PictureRules
from moe_train.machine.mesh import make_mesh, put_batch
from moe_train.model import parameters as flat
from moe_train.model.encoders.pictures import Pictures
from moe_train.model.paths import ParameterPath
from moe_train.model.transformer import abstract_model
from moe_train.weights import external
from tests.judges.test_transformers_and_peft import distance
from tests.judges.test_wrappers import PLACEHOLDER, wrapper

pytestmark = pytest.mark.judges

ROWS = 4
SEQ_LEN = 64
PATCHES = 64
SIZES = ((56, 56), (28, 56))
"""Height and width of two pictures."""
KINDS = [("mistral3", "mistral"), ("mistral3", "ministral3"), ("mistral3", "mistral4"), ("llava", "mistral")]


class Packed(NamedTuple):
    """A batch of rows, of which the first has three segments: a picture, none, a picture."""

    batch: PictureBatch
    segments: list[tuple[np.ndarray, np.ndarray | None]]
    """Tokens and pixels of each segment of the first row."""


def packed(encoder: config.VisionEncoder) -> Packed:
    draw = np.random.default_rng(5)
    rules = PictureRules(encoder.patch_size, encoder.cell_size, encoder.max_image_size, PLACEHOLDER, 12, 13)
    batch = picture_batch(encoder, PATCHES).empty(ROWS, SEQ_LEN)
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
            pictures = PicturesOfPiece((patched(pixels, rules),), PLACEHOLDER)
        segments.append((tokens, pixels))
        pieces.append(StoredPiece(tokens, np.ones(length, bool), pictures=pictures))
    batch.fill_row(0, pieces)
    for row in range(1, ROWS):  # the same again, in another order
        batch.fill_row(row, pieces[1:])
    return Packed(batch, segments)


def pictures_of(batch: Any) -> Pictures:
    return Pictures(batch.patches, batch.places, batch.picture_ids, batch.feature_index)


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
            pictures = pictures_of(placed)
            hidden, _ = module(placed.tokens, placed.positions, placed.segment_ids, pictures=pictures)
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
    encoder = external.read_vision_encoder(tmp_path / "base")
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
    meshes = [make_mesh(config.Mesh(), jax.devices()[:1])]
    if text != "mistral4":
        meshes.append(make_mesh(config.Mesh(fsdp=2, context=2, tensor=2)))
    for mesh in meshes:
        found = ours(tmp_path / "base", encoder, batch, mesh)
        expected = np.concatenate(features)
        assert distance(found.features[0, : len(expected)], expected) < 1e-5
        expected = np.concatenate(logits)
        assert distance(found.logits[0, : len(expected)], expected) < 1e-4
        of_embed = theirs["language_model.embed_tokens.weight"]
        compare = {
            "embed.weight": of_embed,
            "vision.projector.in_proj.weight": theirs["multi_modal_projector.linear_1.weight"].T,
            "vision.tower.patch_proj.weight": theirs["vision_tower.patch_conv.weight"].reshape(16, -1).T,
            "vision.tower.layers.ffn_norm.scale": np.stack(
                [theirs[f"vision_tower.transformer.layers.{layer}.ffn_norm.weight"] for layer in range(2)]
            ),
        }
        for path, gradient in compare.items():
            assert distance(found.gradients[path], gradient) < 1e-3, path


def test_native_files_give_the_same_tower(tmp_path: Path) -> None:
    base = tmp_path / "base"
    wrapper("mistral3", "mistral", vocab_size=300).save_pretrained(base)
    train_tokenizer(["some text to learn from"] * 5, 270, tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").iterdir():
        shutil.copyfile(file, base / file.name)
    export(base, tmp_path / "native", "mistral", options=ExportOptions(depth="tensors"))
    encoders = [external.read_vision_encoder(path) for path in (base, tmp_path / "native")]
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
