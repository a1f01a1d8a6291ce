"""transformers as judge of sound: features, logits and gradients through a Voxtral, packed and on any mesh."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train import config
from moe_train.commands.adapters import merge_into
from moe_train.commands.compare_adapters import diff
from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.data.batches.batch import StoredPiece
from moe_train.data.batches.media_batch import MediaBatch, media_batch
from moe_train.data.media import MediaOfPiece
from moe_train.data.sound.log_mel import log_mel
from moe_train.data.sound.rules import SoundRules
from moe_train.machine.mesh import make_mesh, put_batch
from moe_train.model import parameters as flat
from moe_train.model.paths import ParameterPath
from moe_train.model.transformer import abstract_model
from moe_train.proof.prove_adapter import AdapterExport, prove_adapter
from moe_train.train.objectives.next_token import media_of
from moe_train.weights import external, names, peft
from moe_train.weights.wrappers import encoders
from tests.judges.test_transformers_and_peft import distance
from tests.judges.test_wrappers import AUDIO_PLACEHOLDER, read_wrapper, wrapper

pytestmark = pytest.mark.judges

ROWS = 4
SEQ_LEN = 64
CHUNKS = 4
CLIPS = (2, 0, 1)
"""Chunks of the sound of three segments."""


class Packed(NamedTuple):
    """A batch of rows, of which the first has three segments: a clip of two chunks, none, a clip of one."""

    batch: MediaBatch
    segments: list[tuple[np.ndarray, np.ndarray]]
    """Tokens and spectrograms (chunks, frames, bands) of each segment of the first row."""


def packed(encoder: config.AudioEncoder) -> Packed:
    draw = np.random.default_rng(5)
    batch = media_batch(encoder, CHUNKS).empty(ROWS, SEQ_LEN)
    segments = []
    pieces = []
    for chunks, length in zip(CLIPS, (24, 11, 15), strict=True):
        tokens = draw.integers(25, 126, length)
        spectrograms = draw.normal(size=(chunks, encoder.frames_per_chunk, encoder.num_mel_bins)).astype(np.float32)
        tokens[2 : 2 + chunks * encoder.tokens_per_chunk] = AUDIO_PLACEHOLDER
        segments.append((tokens, spectrograms))
        places = np.zeros((chunks, 2), np.int32)
        sound = MediaOfPiece(spectrograms, places, np.arange(1, chunks + 1), AUDIO_PLACEHOLDER) if chunks else None
        pieces.append(StoredPiece(tokens, np.ones(length, bool), media=sound))
    batch.fill_row(0, pieces)
    for row in range(1, ROWS):  # the same again, in another order
        batch.fill_row(row, pieces[1:])
    return Packed(batch, segments)


class Ours(NamedTuple):
    features: np.ndarray
    logits: np.ndarray
    gradients: dict[str, np.ndarray]


def ours(base: Path, encoder: config.AudioEncoder, batch: Any, mesh: jax.sharding.Mesh) -> Ours:
    with jax.set_mesh(mesh):
        model = external.read_external_model(base)
        structure, shapes = flat.parameters(abstract_model(model, config.Compute(), None, encoder))
        weights = external.load_external_parameters(base, shapes)
        placed = put_batch(batch, mesh)

        def loss(weights: dict[str, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            module = flat.combine(structure, weights)
            sound = media_of(placed)
            hidden, _ = module(placed.tokens, placed.positions, placed.segment_ids, media=sound)
            logits = module.logits(hidden)
            chosen = jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(placed.targets, model.vocab_size), axis=-1)
            is_first = placed.loss_mask & (np.arange(ROWS) == 0)[:, None]
            return -jnp.sum(jnp.where(is_first, chosen, 0)), (module.audio(sound.placed()), logits)

        (_, (features, logits)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights)
        return Ours(np.asarray(features), np.asarray(logits), {path: np.asarray(x) for path, x in gradients.items()})


def test_features_logits_and_gradients_equal_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    judge = wrapper("voxtral", "llama")
    judge.save_pretrained(tmp_path / "base")
    encoder = external.read_encoder(tmp_path / "base", config.AudioEncoder)
    assert external.find_encoder(tmp_path / "base") == encoder
    batch, segments = packed(encoder)
    total = 0.0
    features, logits = [], []
    for tokens, spectrograms in segments:
        inputs: dict[str, Any] = {}
        if len(spectrograms):
            inputs["input_features"] = torch.tensor(spectrograms).transpose(1, 2)
            with torch.no_grad():
                features.append(judge.get_audio_features(**inputs).pooler_output.numpy())
        output = judge(input_ids=torch.tensor(tokens)[None], **inputs).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(output, torch.tensor(tokens[1:]), reduction="sum")
        logits.append(output.detach().numpy())
    total.backward()
    theirs = {name.removeprefix("model."): x.grad.numpy() for name, x in judge.named_parameters() if x.grad is not None}
    files = external.open_external_weights(tmp_path / "base")
    assert files.carried is not None
    pieces = [piece for piece in encoders.pieces_of(files.carried, files.model) if "embed_positions" not in piece.name]
    assert {piece.name for piece in pieces} == {name for name in theirs if not name.startswith(("language_model.", "lm_head."))}
    for mesh in (make_mesh(config.Mesh(), jax.devices()[:1]), make_mesh(config.Mesh(fsdp=2, context=2, tensor=2))):
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
        config.LoraTarget(modules=("audio.tower.layers.attention.*",), rank=2, alpha=3.0),
        config.LoraTarget(modules=("audio.projector.in_proj",), rank=3, alpha=4.0),
    ),
    train=(
        "*_norm",
        "audio.projector.out_proj",
        "audio.tower.layers.up_proj",
        "audio.tower.layers.ffn_norm",
        "audio.tower.*_conv",
        "audio.tower.norm",
    ),
)
"""Adapters of three shapes, and modules in full, in both parts."""


def test_an_adapter_of_the_tower_works_in_peft_and_is_merged(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    PeftModel = pytest.importorskip("peft").PeftModel
    base = tmp_path / "base"
    wrapper("voxtral", "llama", vocab_size=300).save_pretrained(base)
    train_tokenizer(["some text to learn from"] * 5, 270, tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").iterdir():
        shutil.copyfile(file, base / file.name)
    encoder = external.read_encoder(base, config.AudioEncoder)
    batch, segments = packed(encoder)
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        model = external.read_external_model(base)
        structure, shapes = flat.parameters(abstract_model(model, config.Compute(), ADAPTED, encoder))
        frozen = {path: like for path, like in shapes.items() if not ParameterPath.parse(path).is_trained(ADAPTED)}
        weights = external.load_external_parameters(base, frozen)
        draw = np.random.default_rng(8)
        for path, like in shapes.items():
            if path not in weights:
                weights[path] = jnp.asarray(draw.normal(0, 0.3, like.shape), like.dtype)
        module = flat.combine(structure, weights)
        hidden, _ = module(batch.tokens, batch.positions, batch.segment_ids, media=media_of(batch))
        ours = np.asarray(module.logits(hidden))[0]
        adapter = tmp_path / "adapter"
        peft.export_adapter(weights, model, ADAPTED, adapter, base_model=str(base), layout=names.WRAPPED, encoder=encoder)
        prove_adapter(AdapterExport(adapter, "peft", weights, model, ADAPTED, None, None, base=base, encoder=encoder))
        # Read again, from the names on the wrapper.
        section = peft.read_lora(adapter, model, encoder)
        likes = {path: like for path, like in shapes.items() if ParameterPath.parse(path).is_trained(section)}
        read = peft.load_adapter(adapter, model, likes, encoder)
        assert read.keys() == shapes.keys() - frozen.keys()
        assert all(np.array_equal(read[path], weights[path]) for path in read)

    def logits_of(judge: Any) -> np.ndarray:
        outputs = []
        for tokens, spectrograms in segments:
            inputs = {"input_features": torch.tensor(spectrograms).transpose(1, 2)} if len(spectrograms) else {}
            with torch.no_grad():
                outputs.append(judge(input_ids=torch.tensor(tokens)[None], **inputs).logits[0, :-1].numpy())
        return np.concatenate(outputs)

    judge = PeftModel.from_pretrained(read_wrapper("voxtral", base), adapter).eval()
    expected = logits_of(judge)
    assert distance(ours[: len(expected)], expected) < 1e-4
    assert distance(logits_of(judge.merge_and_unload()), expected) < 1e-4
    assert distance(logits_of(read_wrapper("voxtral", base)), expected) > 0.01
    record = merge_into(base, adapter, tmp_path / "merged")
    assert not [check for check in record["checks"] if check["passed"] is False]
    assert distance(logits_of(read_wrapper("voxtral", tmp_path / "merged")), expected) < 1e-4
    # What differs from the base is what has an adapter or was trained, as PEFT merges it.
    ours_merged = dict(read_wrapper("voxtral", tmp_path / "merged").named_parameters())
    for name, x in judge.merge_and_unload().named_parameters():
        assert distance(ours_merged[name].detach().numpy(), x.detach().numpy()) < 1e-6, name
    moved = {(change.layer, change.module) for change in diff(adapter, base).changes}
    assert {(None, "audio.tower.first_conv"), (1, "audio.tower.layers.attention.k_proj"), (None, "audio.tower.norm")} <= moved


@pytest.mark.parametrize("seconds", [0.5, 30.0, 31.0])
def test_spectrograms_equal_those_of_whispers_extractor(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    rules = SoundRules(16000, 128, 160, 400, 3000, 8, 24, 25)
    samples = np.random.default_rng(0).normal(0, 0.1, int(seconds * 16000)).astype(np.float32)
    samples[: len(samples) // 2] *= 1e-3  # a quiet half
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    # As VoxtralProcessor pads and cuts.
    settings = {"sampling_rate": 16000, "truncation": False, "pad_to_multiple_of": 480000, "padding": True, "return_tensors": "np"}
    found = log_mel(samples, rules)
    for method in ("_np_extract_fbank_features", "_torch_extract_fbank_features"):
        monkeypatch.setattr(extractor, "_torch_extract_fbank_features", getattr(type(extractor), method).__get__(extractor))
        features = extractor(samples, **settings)["input_features"]
        theirs = features.reshape(128, -1, 3000).transpose(1, 2, 0)
        assert np.abs(found - theirs).max() < 1e-5 * np.abs(theirs).max(), method
