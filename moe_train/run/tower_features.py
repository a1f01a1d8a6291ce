"""Features of a frozen tower: computed once with the weights of `init_from`, and stored with the prepared sets."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from moe_train import config
from moe_train.checkpoint.identity import base_origin
from moe_train.checkpoint.metadata import WeightOrigin
from moe_train.checkpoint.model_dir import load_parameters
from moe_train.data.batches.batch import BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.batches.media_batch import media_batch
from moe_train.data.batches.sources import RowSource
from moe_train.data.media import media_of_piece
from moe_train.data.prepared.features import (
    FeatureFiles,
    FeatureIdentity,
    MediaFile,
    StoredFeatures,
    distinct_files,
    features_folder,
)
from moe_train.data.prepared.store import TokenStore
from moe_train.data.prepared.tokenize_ahead import only_one
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine import progress
from moe_train.machine.files import check_space
from moe_train.machine.mesh import BATCH, make_mesh, put_batch
from moe_train.machine.processes import require_one_process
from moe_train.model.encoders.media import Media
from moe_train.model.parameters import Parameters, combine_some, parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.transformer import abstract_model
from moe_train.run.inputs import RunInputs
from moe_train.train.objectives.choose import objective_of_run

Say = Callable[[str], None]


class _Missing(NamedTuple):
    """Features of a source that are not stored yet."""

    source: RowSource
    folder: Path
    identity: FeatureIdentity
    files: list[MediaFile]

    @property
    def nbytes(self) -> int:
        """Bytes of the features of the source."""
        return sum(file.tokens for file in self.files) * self.identity.row_bytes


def add_features(run: config.Run, inputs: RunInputs, base: WeightOrigin | None, mesh: Mesh, say: Say) -> None:
    """Give the loaders of a run the stored features of their pictures or sound; compute those that are missing.

    Nothing happens if the tower runs in every step.

    Args:
        run: the resolved run.
        inputs: the opened data.
        base: the weights that the run starts from.
        mesh: the mesh, which is in force.
        say: prints a line.

    Raises:
        ValueError: a set holds features of another tower, or the features take more than the limit.
    """
    if run.stored_features is None:
        return
    assert base is not None  # `Config` requires init_from
    sources = [*inputs.train.sources, *(() if inputs.held_out is None else inputs.held_out.sources)]
    stored = _stored(run, sources, base, mesh, say)
    num_train = len(inputs.train.sources)
    inputs.train.add_features(stored[:num_train])
    if inputs.held_out is not None:
        inputs.held_out.add_features(stored[num_train:])


def store_features(run: config.Run, tokenizer: Tokenizer, say: Say) -> None:
    """Store the features of the pictures or sound of a run's prepared sets, before it starts.

    Raises:
        ValueError: the run computes them in every step, or as in `add_features`.
    """
    if run.stored_features is None or run.init_from is None:
        raise ValueError(
            "--features has no effect: the config does not read stored features; set vision: {features: {name: stored}}, or the "
            "same in audio, or leave it out"
        )
    require_one_process("storing features")
    data = run.training_data()
    every = data.model_copy(update={"eval": tuple(x.model_copy(update={"weight": None}) for x in (*data.train, *data.eval))})
    batch_type = objective_of_run(run).batch_type
    loader = Loader(every, "eval", tokenizer, BatchRows(1, run.train.seq_len), seed=run.seed, batch_type=batch_type)
    mesh = make_mesh(run.mesh)
    with jax.set_mesh(mesh):
        _stored(run, loader.sources, base_origin(run.init_from), mesh, say)


def tower_hash(run: config.Run, base: WeightOrigin) -> str:
    """Return one hash over the sizes and every byte of the tower and the projector that a run starts from."""
    assert run.encoder is not None
    # A run that is started from may have trained its tower, so that all of its checkpoint counts.
    of_run = {} if base.step is None else dict(base.hashes)
    content = [run.encoder.model_dump(mode="json"), dict(base.carried), of_run]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _stored(run: config.Run, sources: Sequence[RowSource], base: WeightOrigin, mesh: Mesh, say: Say) -> list[StoredFeatures | None]:
    """Return the features of each source, and compute those that are missing; None for a source without pictures and sound."""
    cache_dir = run.training_data().cache_dir
    tower_sha256 = tower_hash(run, base)
    places: list[tuple[Path, FeatureIdentity] | None] = []
    missing: dict[Path, _Missing] = {}
    for source in sources:
        store = source.store
        if store.manifest.media is None:
            places.append(None)
            continue
        identity = FeatureIdentity(store.manifest.hash, tower_sha256, run.compute.dtype, run.model.model_dim)
        is_named = isinstance(source.section, config.PreparedSource)
        folder = features_folder(store.path, cache_dir, store.manifest, identity, is_named)
        places.append((folder, identity))
        if not folder.exists() and folder not in missing:
            missing[folder] = _Missing(source, folder, identity, distinct_files(store))
    if missing:
        _check_limit(run, list(missing.values()), say)
        _compute_all(run, list(missing.values()), base, mesh, say)
    memory = Path(cache_dir) / "scans"
    return [None if place is None else StoredFeatures(*place, memory) for place in places]


def _check_limit(run: config.Run, missing: Sequence[_Missing], say: Say) -> None:
    """Say how many bytes the features will take. Raises ValueError if that is more than the limit, or than the disk has."""
    stored = run.stored_features
    assert stored is not None
    require_one_process("computing features that are not stored yet (moe-train data prepare CONFIG --features does so in advance)")
    total = sum(part.nbytes for part in missing)
    limit = int(stored.max_gib * 2**30)
    if total > limit:
        raise ValueError(
            f"the features of {sum(len(part.files) for part in missing):,} files take {total:,} bytes, and features.max_gib "
            f"{stored.max_gib:g} allows {limit:,}; set it to {math.ceil(total / 2**30 * 100) / 100:g}, or features to computed"
        )
    for part in missing:
        check_space(part.folder, part.nbytes)
        say(f"storing the features of {len(part.files):,} files of {part.source.name}, {part.nbytes:,} bytes: {part.folder}")


def _compute_all(run: config.Run, missing: Sequence[_Missing], base: WeightOrigin, mesh: Mesh, say: Say) -> None:
    """Compute and write the features of some sources, with one copy of the tower."""
    assert run.encoder is not None
    structure, shapes = parameters(abstract_model(run.model, run.compute, None, run.encoder))
    tower = {path: like for path, like in shapes.items() if ParameterPath.parse(path).is_tower}
    weights = load_parameters(base.source, tower, base.step)
    compute = jax.jit(partial(_features, structure))
    for part in missing:
        with only_one(Path(run.training_data().cache_dir) / f"{part.folder.name}-{part.identity.set_hash[:16]}.lock"):
            if part.folder.exists():  # another process has made it while this one waited
                continue
            # By size, so that few programs are compiled and little is padding.
            files = sorted(part.files, key=lambda file: _room(file.tokens))
            writer = FeatureFiles(part.folder, part.identity, files)
            if writer.num_stored:
                say(f"continuing after {writer.num_stored:,} files")
            done = progress.counted("computing features", len(files) - writer.num_stored, "files")
            batches = _computed(run.encoder, part.source.store, files[writer.num_stored :], mesh, partial(compute, weights))
            writer.append(_reporting(batches, done))
            writer.finish()


def _reporting(features: Iterator[np.ndarray], done: Callable[[int], None]) -> Iterator[np.ndarray]:
    for rows in features:
        yield rows
        done(1)


def _computed(
    encoder: config.Encoder, store: TokenStore, files: Sequence[MediaFile], mesh: Mesh, compute: Callable[[Any], jax.Array]
) -> Iterator[np.ndarray]:
    """Yield the features (tokens, width) of files in their order; each is alone in a row."""
    rows = math.prod(mesh.shape[axis] for axis in BATCH)
    start = 0
    while start < len(files):
        room = _room(files[start].tokens)
        together = [file for file in files[start : start + rows] if _room(file.tokens) == room]
        arrays = _arranged(encoder, store, together, rows, room, mesh.shape["context"])
        features = np.asarray(compute(put_batch(arrays, mesh)))
        for row, file in enumerate(together):
            yield features[row, : file.tokens]
        start += len(together)


def _room(tokens: int) -> int:
    """Return the tokens of the program that computes a file: a power of two."""
    return 1 << max(0, tokens - 1).bit_length()


def _arranged(encoder: config.Encoder, store: TokenStore, files: Sequence[MediaFile], rows: int, room: int, context: int) -> Media:
    """Return the pictures or clips as NumPy arrays, one in a row, with room for `room` tokens or a little more."""
    if isinstance(encoder, config.AudioEncoder):
        count = -(-room // encoder.tokens_per_chunk)
        count += -count % context
    else:
        count = (room + -room % context) * encoder.patches_per_token
    arrays = media_batch(encoder, count).empty(rows, context)  # no tokens: only the features are wanted
    for row, file in enumerate(files):
        media = media_of_piece([store.media_files(file.example)[file.number]], store.manifest.media)
        assert media is not None
        arrays.units[row, : len(media.units)] = media.units
        arrays.places[row, : len(media.units)] = media.places
        arrays.ids[row, : len(media.units)] = media.ids
    return Media(arrays.units, arrays.places, arrays.ids, arrays.feature_index)  # type: ignore[arg-type]


def _features(structure: Any, weights: Parameters, media: Media) -> jax.Array:
    """Return the features of each row on every device."""
    features = combine_some(structure, weights).media_features(media.placed())
    return jax.sharding.reshard(features, jax.sharding.PartitionSpec())
