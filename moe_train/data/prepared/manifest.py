"""`manifest.json`, beside every prepared set: which files it was made from, by which rules, and one hash over all of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from moe_train.machine.files import write_text

NAME = "manifest.json"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceFile(_Entry):
    """A place of a source and what came out of it: a file, a data set of the hub, or a caller's own records.

    sha256: of the file, or the identity of a caller's records; None for a data set of the hub, which its path pins.
    tokens: ids, BOS and EOS included.
    """

    path: str
    sha256: str | None
    size: int | None
    by_line: bool
    records: int
    tokens: int


class ShardEntry(_Entry):
    """A folder beside the manifest. spans: (file, first byte, last byte or null, first line), as records stand in it.

    examples: sequences of ids, of which a record gives none (no text), one, or several.
    """

    name: str
    spans: tuple[tuple[int, int, int | None, int], ...]
    examples: int
    tokens: int
    sizes: dict[str, int]
    sha256: str


class Rules(_Entry):
    """What made ids of records. record: the section of the config; libraries: their versions."""

    record: dict[str, Any]
    template_sha256: str | None
    libraries: dict[str, str]


class Manifest(_Entry):
    """loss_tokens: ids that bear loss; empty: records without text, left out; too_long: what the config said of such."""

    layout: Literal[2] = 2
    hash: str = ""
    licence: str | None
    origin: str | None
    tokenizer_sha256: str
    rules: Rules
    rules_sha256: str
    too_long: Literal["split", "truncate", "drop", "error"]
    dtype: Literal["uint16", "uint32"]
    records: int
    empty: int
    examples: int
    tokens: int
    loss_tokens: int
    files: tuple[SourceFile, ...]
    shards: tuple[ShardEntry, ...]

    def sealed(self) -> Self:
        """With its hash, which covers everything but where the files lie and what is done with records that are too long."""
        said = self.model_dump(mode="json", exclude={"hash": True, "too_long": True, "files": {"__all__": {"path"}}})
        return self.model_copy(update={"hash": _sha256(said)})

    def write(self, directory: Path) -> None:
        write_text(directory / NAME, self.model_dump_json(indent=1) + "\n")


def read(text: str | bytes, where: str) -> Manifest:
    """Raises ValueError in one line where it is not a manifest, of another layout, or not as it was written."""
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where} is no manifest that this version reads: {at}: {first['msg']}; prepare the data again") from error
    if manifest.sealed().hash != manifest.hash:
        raise ValueError(f"{where} was changed after it was written: its hash is another; prepare the data again")
    return manifest


def hash_of_all(manifests: list[Manifest]) -> str:
    """One hash over the prepared sets that a run learns from."""
    return manifests[0].hash if len(manifests) == 1 else _sha256([manifest.hash for manifest in manifests])


def text_of_all(manifests: list[Manifest]) -> str:
    """JSON: that hash, and the manifests under `sets`."""
    sets = [manifest.model_dump(mode="json") for manifest in manifests]
    return json.dumps({"hash": hash_of_all(manifests), "sets": sets}, indent=1, ensure_ascii=False) + "\n"


def _sha256(said: Any) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
