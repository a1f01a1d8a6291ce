"""Log-probabilities of a prepared set's targets under a reference model, stored beside the set.

SET/reference-MODEL/logprobs     float32: for each example, one number for each position that it takes in a row
                    about.json   the set and the model that they belong to, written last

MODEL is the beginning of the model's hash, with `-shared` after it where both answers of a pair share the positions of one prompt.
The manifest's hash covers records, tokenizer and chat template, so one that differs means other ids.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_train.data.prepared.manifest import Manifest
from moe_train.machine.files import new_directory, read_object

PREFIX = "reference-"
"""How the names of folders with log-probabilities begin."""


class ReferenceIdentity(NamedTuple):
    """What stored log-probabilities belong to."""

    set_hash: str
    """The hash of the prepared set's manifest."""
    model_sha256: str
    """A hash over every byte of the reference model."""
    positions: int
    """Positions of all examples together, mismatched answers included."""
    computed: int
    """Positions of those examples that fit into a row; the others have none."""
    shared_prompt: bool = False
    """Whether both answers of a pair share the positions of one prompt."""

    @property
    def folder_name(self) -> str:
        """Name of the folder that holds them."""
        return f"{self.of_model}-shared" if self.shared_prompt else self.of_model

    @property
    def of_model(self) -> str:
        """How the names of all folders with log-probabilities of the model begin."""
        return f"{PREFIX}{self.model_sha256[:16]}"


class StoredReference:
    """The log-probabilities of a set, read on demand.

    Args:
        directory: The folder.
        identity: What the log-probabilities have to belong to.
        lengths: (N,) positions that each example takes in a row.

    Raises:
        FileNotFoundError: There are none.
        ValueError: They belong to another set or model, or are damaged.
    """

    def __init__(self, directory: Path, identity: ReferenceIdentity, lengths: np.ndarray) -> None:
        about = read_object(directory / "about.json")
        for name, expected in identity._asdict().items():
            # Folders of earlier versions do not state a layout: they had a prompt for each answer.
            if about.get(name, False if name == "shared_prompt" else None) != expected:
                raise ValueError(
                    f"{directory} holds reference log-probabilities of another {_WORDS[name]} ({about.get(name)}, not {expected}); "
                    "remove the folder to compute them again"
                )
        file = directory / "logprobs"
        size = file.stat().st_size if file.exists() else 0
        if size != 4 * identity.positions or hashlib.sha256(file.read_bytes()).hexdigest() != about.get("sha256"):
            raise ValueError(f"{file} is damaged: it does not have the bytes that about.json states; remove {directory}")
        self._ends = np.cumsum(lengths)
        self._values = np.memmap(file, dtype=np.float32, mode="r") if size else np.zeros(0, np.float32)

    def read(self, example: int) -> np.ndarray:
        """Return the log-probabilities of an example's targets, one for each position."""
        start = self._ends[example - 1] if example else 0
        return np.asarray(self._values[start : self._ends[example]])


_WORDS = {
    "set_hash": "prepared set (records, tokenizer or chat template)",
    "model_sha256": "model",
    "positions": "packing",
    "computed": "train.seq_len",
    "shared_prompt": "objective.shared_prompt",
}


def write_reference(directory: Path, identity: ReferenceIdentity, values: np.ndarray) -> None:
    """Write the log-probabilities of a whole set into a new folder, which appears complete or not at all."""
    content = np.ascontiguousarray(values, np.float32).tobytes()
    with new_directory(directory) as unfinished:
        (unfinished / "logprobs").write_bytes(content)
        about = {**identity._asdict(), "sha256": hashlib.sha256(content).hexdigest()}
        (unfinished / "about.json").write_text(json.dumps(about, indent=1) + "\n")


def reference_folder(set_path: str, cache_dir: str, manifest: Manifest, identity: ReferenceIdentity, is_prepared: bool) -> Path:
    """Return the folder for the log-probabilities of a set: in the set, or in the cache for one in a bucket.

    Args:
        set_path: Folder or URL of the set.
        cache_dir: The cache of the run.
        manifest: The set's manifest.
        identity: What the log-probabilities belong to.
        is_prepared: Whether the config names the set itself, so that log-probabilities of another model in it are a mistake.

    Raises:
        ValueError: The named set holds log-probabilities of another model.
    """
    if "://" in set_path:
        return Path(cache_dir) / "references" / manifest.hash[:32] / identity.folder_name
    folder = Path(set_path) / identity.folder_name
    others = sorted(path for path in Path(set_path).glob(f"{PREFIX}*") if not path.name.startswith(identity.of_model))
    if is_prepared and others and not folder.exists():
        raise ValueError(
            f"{others[0]} holds reference log-probabilities of another model than init_from; start from that model, or remove the "
            "folder to compute them again"
        )
    return folder
