"""Outputs of a reference model on a prepared set, stored beside the set: log-probabilities of targets, and chosen experts.

SET/reference-MODEL/logprobs     float32: for each example, one number for each position that it takes in a row
                    experts      uint8, or uint16 with more than 256 experts: at each position the ids of the chosen experts, sparse
                                 layer by sparse layer; absent for a dense model
                    about.json   the set and the model that they belong to, written last

MODEL is the beginning of the model's hash, with `-shared` after it where both answers of a pair share the positions of one prompt.
The manifest's hash covers records, tokenizer and chat template, so one that differs means other ids.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_train.data.prepared.manifest import Manifest
from moe_train.data.prepared.reference_values import ReferenceValues
from moe_train.machine.files import read_object

LOGPROBS = "logprobs"
EXPERTS = "experts"
PREFIX = "reference-"
"""How the names of folders with log-probabilities begin."""


class StoredExperts(NamedTuple):
    """The experts that the routers of a reference model choose, as they are stored."""

    layers: int
    """Number of sparse layers."""
    per_token: int
    """Experts of a token in each of them."""
    num_experts: int
    """Number of experts of a layer, which decides the dtype of their ids."""

    @property
    def ids_per_position(self) -> int:
        """Number of ids of one position."""
        return self.layers * self.per_token

    @property
    def bytes_per_position(self) -> int:
        """Bytes that the ids of one position take."""
        return self.ids_per_position * np.dtype(self.dtype).itemsize

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """The smallest dtype that holds every id."""
        return np.uint8 if self.num_experts <= 256 else np.uint16


class ReferenceIdentity(NamedTuple):
    """What stored outputs of a reference model belong to."""

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
    expert_ids: int = 0
    """Number of ids of experts at each position; 0 for a dense model."""

    @property
    def folder_name(self) -> str:
        """Name of the folder that holds them."""
        return f"{self.of_model}-shared" if self.shared_prompt else self.of_model

    @property
    def of_model(self) -> str:
        """How the names of all folders with outputs of the model begin."""
        return f"{PREFIX}{self.model_sha256[:16]}"


class StoredReference:
    """The outputs of a reference model on a set, read on demand.

    Args:
        directory: The folder.
        identity: What the outputs have to belong to.
        lengths: (N,) positions that each example takes in a row.
        experts: The chosen experts that are stored; None for a dense model.

    Raises:
        FileNotFoundError: There are none.
        ValueError: They belong to another set or model, or are damaged.
    """

    def __init__(
        self, directory: Path, identity: ReferenceIdentity, lengths: np.ndarray, experts: StoredExperts | None = None
    ) -> None:
        about = read_object(directory / "about.json")
        for name, expected in identity._asdict().items():
            # Folders of earlier versions state neither a layout nor experts: they had a prompt for each answer, and no experts.
            if about.get(name, ReferenceIdentity._field_defaults.get(name)) != expected:
                raise ValueError(
                    f"{directory} holds reference log-probabilities of another {_WORDS[name]} ({about.get(name)}, not {expected}); "
                    "remove the folder to compute them again"
                )
        self.experts = experts
        self._ends = np.cumsum(lengths)
        self._logprobs = _checked(directory, LOGPROBS, np.float32, (identity.positions,), about.get("sha256"))
        self._expert_ids: np.ndarray | None = None
        if experts is not None:
            shape = (identity.positions, experts.ids_per_position)
            self._expert_ids = _checked(directory, EXPERTS, experts.dtype, shape, about.get("experts_sha256"))

    def read(self, example: int) -> ReferenceValues:
        """Return the outputs at the positions of an example."""
        positions = slice(self._ends[example - 1] if example else 0, self._ends[example])
        expert_ids = None if self._expert_ids is None else np.asarray(self._expert_ids[positions])
        return ReferenceValues(np.asarray(self._logprobs[positions]), expert_ids)


def _checked(directory: Path, name: str, dtype: type[np.generic], shape: tuple[int, ...], sha256: object) -> np.ndarray:
    """Return the mapped array of a file. Raises ValueError if it does not have the bytes that about.json states."""
    file = directory / name
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not file.exists() or file.stat().st_size != size or _sha256(file) != sha256:
        raise ValueError(f"{file} is damaged: it does not have the bytes that about.json states; remove {directory}")
    return np.memmap(file, dtype=dtype, mode="r", shape=shape) if size else np.zeros(shape, dtype)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


_WORDS = {
    "set_hash": "prepared set (records, tokenizer or chat template)",
    "model_sha256": "model",
    "positions": "packing",
    "computed": "train.seq_len",
    "shared_prompt": "objective.shared_prompt",
    "expert_ids": "version, without the experts that the reference chose",
}


class ReferenceWriter:
    """Writes the outputs of a reference model, example by example, into files that are mapped into memory.

    Args:
        directory: An empty folder.
        identity: What the outputs belong to.
        experts: The chosen experts to store; None for a dense model.
    """

    def __init__(self, directory: Path, identity: ReferenceIdentity, experts: StoredExperts | None = None) -> None:
        self._directory = directory
        self._identity = identity
        self._logprobs = np.memmap(directory / LOGPROBS, np.float32, "w+", shape=(identity.positions,))
        # Examples that fit into no row have none.
        self._logprobs[:] = np.nan
        self._expert_ids: np.memmap | None = None
        if experts is not None:
            shape = (identity.positions, experts.ids_per_position)
            self._expert_ids = np.memmap(directory / EXPERTS, experts.dtype, "w+", shape=shape)

    def write(self, start: int, values: ReferenceValues) -> None:
        """Write the outputs at consecutive positions, the first of which is `start`, counted over all examples of the set."""
        positions = slice(start, start + len(values.logprobs))
        self._logprobs[positions] = values.logprobs
        if self._expert_ids is not None:
            self._expert_ids[positions] = values.expert_ids

    def finish(self) -> None:
        """Write what the files belong to, after everything else."""
        about = {**self._identity._asdict()}
        for name, key, array in ((LOGPROBS, "sha256", self._logprobs), (EXPERTS, "experts_sha256", self._expert_ids)):
            if array is not None:
                array.flush()
                about[key] = _sha256(self._directory / name)
        (self._directory / "about.json").write_text(json.dumps(about, indent=1) + "\n")


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
