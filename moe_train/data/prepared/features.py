"""Features of the pictures or the sound of a prepared set, as a frozen tower computes them, stored beside the set.

SET/features-TOWER/features     (tokens, width) in the dtype of the computation: the features of each distinct file
                   index        for each distinct file, in the same order: sha256, first row, number of rows
                   about.json   the set and the tower that they belong to, written last

TOWER is the beginning of a hash over the tower and the dtype. A file that many records name is stored once. The folder grows file
by file under the name `.features-TOWER.unfinished`, so that a process that is stopped loses one batch at most.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from moe_train.data.media import MediaRules
from moe_train.data.pictures.rules import PictureRules
from moe_train.data.prepared.feature_values import FeaturesOfPiece
from moe_train.data.prepared.folder import File, LocalFolder
from moe_train.data.prepared.manifest import Manifest
from moe_train.data.prepared.store import ExampleSlice, TokenStore
from moe_train.machine.files import read_object

PREFIX = "features-"
"""How the names of folders with features begin."""
_INDEX = np.dtype([("sha256", np.uint8, 32), ("start", np.int64), ("count", np.int64)])
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
_EXAMPLES_AT_ONCE = 256


class FeatureIdentity(NamedTuple):
    """What stored features belong to."""

    set_hash: str
    """The hash of the prepared set's manifest, which covers how files became tokens and pixels."""
    tower_sha256: str
    """A hash over the sizes and every byte of the tower and its projector."""
    dtype: str
    width: int
    """Width of the text model."""

    @property
    def folder_name(self) -> str:
        """Name of the folder that holds them."""
        return PREFIX + hashlib.sha256(f"{self.tower_sha256} {self.dtype}".encode()).hexdigest()[:16]

    @property
    def row_bytes(self) -> int:
        """Bytes of the features of a token."""
        return self.width * _DTYPES[self.dtype].itemsize


class MediaFile(NamedTuple):
    """A distinct file of a set."""

    sha256: bytes
    example: int
    """The first example that names it."""
    number: int
    """Its number among the files of that example."""
    tokens: int
    """Tokens that stand for its features."""


def distinct_files(store: TokenStore) -> list[MediaFile]:
    """List the files of all pictures or sound of a set, each once, in the order of the examples."""
    media = store.manifest.media
    if media is None:
        return []
    files: dict[bytes, MediaFile] = {}
    examples = np.flatnonzero(store.media_units).tolist()
    lengths = store.lengths()
    for first in range(0, len(examples), _EXAMPLES_AT_ONCE):
        some = examples[first : first + _EXAMPLES_AT_ONCE]
        pieces = store.read([ExampleSlice(i, 0, int(lengths[i])) for i in some], with_media=False)
        for example, piece in zip(some, pieces, strict=True):
            contents = store.media_files(example)
            counts = tokens_of_files(piece.tokens, media)
            for number, (content, tokens) in enumerate(zip(contents, counts, strict=True)):
                digest = hashlib.sha256(content).digest()
                files.setdefault(digest, MediaFile(digest, example, number, tokens))
    return list(files.values())


def feature_token(rules: MediaRules) -> int:
    """Return the id of the token that stands for a feature."""
    return rules.image_token if isinstance(rules, PictureRules) else rules.audio_token


def tokens_of_files(ids: np.ndarray, rules: MediaRules) -> list[int]:
    """Return the number of tokens that stand for features of each file of an example."""
    is_feature = ids == feature_token(rules)
    if isinstance(rules, PictureRules):
        # A picture ends with [IMG_END].
        ends = np.flatnonzero(ids == rules.end_token)
        return np.diff(np.cumsum(is_feature)[ends], prepend=0).tolist()
    # A clip begins with [BEGIN_AUDIO].
    starts = np.flatnonzero(ids == rules.begin_token)
    total = np.append(np.cumsum(is_feature)[starts], is_feature.sum())
    return np.diff(total).tolist()


def features_folder(set_path: str, cache_dir: str, manifest: Manifest, identity: FeatureIdentity, is_prepared: bool) -> Path:
    """Return the folder for the features of a set: in the set, or in the cache for one in a bucket.

    Args:
        set_path: Folder or URL of the set.
        cache_dir: The cache of the run.
        manifest: The set's manifest.
        identity: What the features belong to.
        is_prepared: Whether the config names the set itself, so that features of another tower in it are a mistake.

    Raises:
        ValueError: The named set holds features of another tower.
    """
    if "://" in set_path:
        return Path(cache_dir) / "features" / manifest.hash[:32] / identity.folder_name
    folder = Path(set_path) / identity.folder_name
    others = sorted(path for path in Path(set_path).glob(f"{PREFIX}*") if path.name != identity.folder_name)
    if is_prepared and others and not folder.exists():
        about = read_object(others[0] / "about.json")
        dtype = about.get("dtype")
        other = f"in {dtype}" if about.get("tower_sha256") == identity.tower_sha256 else "of another tower or projector"
        raise ValueError(
            f"{others[0]} holds features {other} than init_from gives in compute.dtype {identity.dtype}; restore what they were "
            "made with, or remove the folder to compute them again"
        )
    return folder


class StoredFeatures:
    """The features of a set, read on demand.

    Args:
        directory: The folder.
        identity: What the features have to belong to.
        memory: The folder in which hashes of unchanged files are remembered.

    Raises:
        ValueError: They belong to another set or tower, or are damaged.
    """

    def __init__(self, directory: Path, identity: FeatureIdentity, memory: Path) -> None:
        about = read_object(directory / "about.json")
        for name, expected in identity._asdict().items():
            if about.get(name) != expected:
                raise ValueError(
                    f"{directory} holds features of another {_WORDS[name]} ({about.get(name)}, not {expected}); remove the folder "
                    "to compute them again"
                )
        folder = LocalFolder(str(directory))
        for name in ("features", "index"):
            file = directory / name
            stated = about.get(name)
            size = file.stat().st_size if file.is_file() else -1
            if not isinstance(stated, dict) or stated != {"bytes": size, "sha256": _hash_of(folder, name, size, memory)}:
                raise ValueError(f"{file} is damaged: it does not have the bytes that about.json states; remove {directory}")
        index = np.fromfile(directory / "index", _INDEX)
        self._places = {row["sha256"].tobytes(): slice(int(row["start"]), int(row["start"] + row["count"])) for row in index}
        raw = np.memmap(directory / "features", np.uint8, "r") if index.size else np.zeros(0, np.uint8)
        self._rows = raw.view(_DTYPES[identity.dtype]).reshape(-1, identity.width)

    def of_example(self, store: TokenStore, example: int) -> FeaturesOfPiece | None:
        """Return the features of an example of the set; None if it has neither pictures nor sound."""
        media = store.manifest.media
        contents = store.media_files(example)
        if media is None or not contents:
            return None
        rows = [self._rows[self._places[hashlib.sha256(content).digest()]] for content in contents]
        return FeaturesOfPiece(np.concatenate(rows), feature_token(media))


_WORDS = {
    "set_hash": "prepared set (records, tokenizer or chat template)",
    "tower_sha256": "tower or projector",
    "dtype": "compute.dtype",
    "width": "text model",
}


def _hash_of(folder: LocalFolder, name: str, size: int, memory: Path) -> str:
    return folder.sha256(File(name, "uint8", size), memory) if size >= 0 else ""


class FeatureFiles:
    """The growing files of the features of a set; `finish` gives them their name.

    Args:
        directory: The folder that the finished files get.
        identity: What they belong to.
        files: All files of the set, in the order in which their features are written.
    """

    def __init__(self, directory: Path, identity: FeatureIdentity, files: Sequence[MediaFile]) -> None:
        self._directory = directory
        self._identity = identity
        self._files = files
        self._unfinished = directory.with_name(f".{directory.name}.unfinished")
        self._unfinished.mkdir(parents=True, exist_ok=True)
        self.num_stored = self._consistent()
        """Number of files whose features are stored already."""

    def _consistent(self) -> int:
        """Cut the files to the features that are complete, and belong to these files in this order; returns their number."""
        index_file = self._unfinished / "index"
        size = index_file.stat().st_size if index_file.exists() else 0
        index = np.fromfile(index_file, _INDEX, size // _INDEX.itemsize) if size else np.zeros(0, _INDEX)
        count = 0
        rows = 0
        for row, file in zip(index, self._files, strict=False):
            if row["sha256"].tobytes() != file.sha256 or int(row["count"]) != file.tokens:
                break
            count += 1
            rows += file.tokens
        for name, length in (("features", rows * self._identity.row_bytes), ("index", count * _INDEX.itemsize)):
            with (self._unfinished / name).open("ab") as stream:
                stream.truncate(length)
        return count

    def append(self, features: Iterator[np.ndarray]) -> None:
        """Append the features of the files that are missing, in their order."""
        start = sum(file.tokens for file in self._files[: self.num_stored])
        with (self._unfinished / "features").open("ab") as content, (self._unfinished / "index").open("ab") as index:
            for file, rows in zip(self._files[self.num_stored :], features, strict=True):
                assert rows.shape == (file.tokens, self._identity.width), (rows.shape, file.tokens)
                content.write(np.ascontiguousarray(rows.astype(_DTYPES[self._identity.dtype])).tobytes())
                # Written last: what the index does not name is cut off when the work continues.
                content.flush()
                entry = np.zeros(1, _INDEX)
                entry["sha256"] = np.frombuffer(file.sha256, np.uint8)
                entry["start"] = start
                entry["count"] = file.tokens
                index.write(entry.tobytes())
                index.flush()
                start += file.tokens

    def finish(self) -> None:
        """Describe the complete files, and give the folder its name."""
        about: dict[str, object] = dict(self._identity._asdict())
        for name in ("features", "index"):
            with (self._unfinished / name).open("rb") as stream:
                os.fsync(stream.fileno())
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            about[name] = {"bytes": (self._unfinished / name).stat().st_size, "sha256": digest}
        (self._unfinished / "about.json").write_text(json.dumps(about, indent=1) + "\n")
        os.rename(self._unfinished, self._directory)
