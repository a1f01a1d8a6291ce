"""Stored features: counts of tokens by file, files that grow and are cut, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_train.data.pictures.rules import PictureRules
from moe_train.data.prepared.features import (
    FeatureFiles,
    FeatureIdentity,
    MediaFile,
    StoredFeatures,
    feature_token,
    tokens_of_files,
)
from moe_train.data.sound.rules import SoundRules

IDENTITY = FeatureIdentity("set", "tower", "bfloat16", 3)
FILES = [MediaFile(bytes([i]) * 32, i, 0, i + 1) for i in range(4)]
ROWS = [np.full((i + 1, 3), i + 0.5, np.float32) for i in range(4)]


def test_tokens_are_counted_file_by_file() -> None:
    pictures = PictureRules(2, 2, 8, 10, 12, 13)
    ids = np.array([1, 10, 10, 12, 10, 10, 13, 5, 10, 13, 10, 12, 10, 13, 2])
    assert tokens_of_files(ids, pictures) == [4, 1, 2] and feature_token(pictures) == 10
    sound = SoundRules(16000, 8, 160, 400, 32, 8, 24, 25)
    assert tokens_of_files(np.array([1, 25, 24, 24, 24, 24, 7, 25, *[24] * 8, 2]), sound) == [4, 8]
    assert tokens_of_files(np.array([1, 2]), sound) == [] == tokens_of_files(np.array([1, 2]), pictures)


def written(folder: Path) -> Path:
    directory = folder / "features-x"
    files = FeatureFiles(directory, IDENTITY, FILES)
    files.append(iter(ROWS[files.num_stored :]))
    files.finish()
    return directory


def test_an_interrupted_file_is_cut_to_what_is_complete(tmp_path: Path) -> None:
    def stopped() -> object:
        yield ROWS[0]
        yield ROWS[1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FeatureFiles(tmp_path / "features-x", IDENTITY, FILES).append(stopped())  # type: ignore[arg-type]
    with (tmp_path / ".features-x.unfinished" / "features").open("ab") as stream:
        stream.write(b"half of a row")
    again = FeatureFiles(tmp_path / "features-x", IDENTITY, FILES)
    assert again.num_stored == 2
    directory = written(tmp_path)
    stored = StoredFeatures(directory, IDENTITY, tmp_path / "memory")
    for file, rows in zip(FILES, ROWS, strict=True):
        assert np.array_equal(stored._rows[stored._places[file.sha256]].astype(np.float32), rows)
    # Other files, or the same ones in another order, are computed anew from where they differ.
    other = [FILES[0], FILES[2], FILES[1]]
    growing = FeatureFiles(tmp_path / "features-y", IDENTITY, FILES)
    growing.append(iter(ROWS))
    assert FeatureFiles(tmp_path / "features-y", IDENTITY, other).num_stored == 1


def test_features_of_something_else_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    directory = written(tmp_path)
    for change, message in (
        ({"set_hash": "b"}, "another prepared set"),
        ({"tower_sha256": "b"}, "another tower or projector"),
        ({"dtype": "float32"}, "another compute.dtype"),
    ):
        with pytest.raises(ValueError, match=message + r".*remove the folder"):
            StoredFeatures(directory, IDENTITY._replace(**change), tmp_path / "memory")  # type: ignore[arg-type]
    content = bytearray((directory / "features").read_bytes())
    content[5] ^= 1
    (directory / "features").write_bytes(content)
    with pytest.raises(ValueError, match="features is damaged"):
        StoredFeatures(directory, IDENTITY, tmp_path / "memory")
