"""The `manifest.json` of a prepared set: the files it was made from, the rules that made it, and one hash over all of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from moe_train.data.media import MediaRules
from moe_train.machine.files import Json, JsonObject, write_text

MANIFEST = "manifest.json"
"""File name of the manifest."""
_OLDER_FIELDS = ("pictures", "sound")
"""Fields of earlier versions, whose shards had other files for pictures and sound; null in sets of text."""


class _Entry(BaseModel):
    """A strict, immutable part of the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceFile(_Entry):
    """A place of a source and its yield: a file, a data set of the hub, or a caller's own records.

    sha256: of the file, or the identity of a caller's records; None for a data set of the hub, which its path pins. size: in
    bytes, for files. tokens: number of ids, BOS and EOS included.
    """

    path: str
    sha256: str | None
    size: int | None
    by_line: bool
    records: int
    tokens: int


class ShardEntry(_Entry):
    """A folder next to the manifest with the ids of consecutive records.

    spans: (index of the file, first byte, last byte or null, first line), in the order of the records. examples: number of
    sequences of ids; a record gives none (no text), one, or several. sizes: file name -> bytes.
    """

    name: str
    spans: tuple[tuple[int, int, int | None, int], ...]
    examples: int
    tokens: int
    sizes: dict[str, int]
    sha256: str


class Rules(_Entry):
    """The rules that turn records into ids.

    record: the config section of the record kind. chat_date: the date that the chat template reads; None if it reads none.
    libraries: library name -> version.
    """

    record: JsonObject
    template_sha256: str | None
    chat_date: str | None = None
    libraries: dict[str, str]


class TeacherEntry(_Entry):
    """The teacher whose predictions are stored with a set.

    model: path of the teacher, or of the files that hold its predictions, for people. sha256: a hash over its weights, or over
    those files. top_k: tokens stored of each prediction. seq_len: positions of the rows that the teacher read. too_long: what
    happened to longer examples. tokens: hash of the set of tokens. kept_mass: mean probability of the stored tokens. agreement:
    share of trained tokens that are the teacher's most likely token.
    """

    model: str
    sha256: str
    top_k: int
    temperature: float
    seq_len: int
    too_long: Literal["split", "truncate", "drop", "error"]
    tokens: str
    kept_mass: float = 0.0
    agreement: float = 0.0


class Manifest(_Entry):
    """The description of a prepared set.

    empty: number of records without text, which are left out. loss_tokens: number of ids that are trained on. too_long: the
    config's setting for records that are too long. unread: number of records in which a key was not read, by its name. teacher:
    None without predictions of a teacher. media: how pictures or sound became tokens; None without either.
    """

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
    unread: dict[str, int] = {}
    files: tuple[SourceFile, ...]
    shards: tuple[ShardEntry, ...]
    teacher: TeacherEntry | None = None
    media: MediaRules | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_older_fields(cls, fields: Any) -> Any:
        """Read `media` from the two fields that stood in its place in earlier versions."""
        if not isinstance(fields, dict):
            return fields  # which is refused, since a manifest is an object
        older = [fields[name] for name in _OLDER_FIELDS if fields.get(name) is not None]
        remaining = {name: value for name, value in fields.items() if name not in _OLDER_FIELDS}
        return {**remaining, "media": older[0]} if older else remaining

    def sealed(self) -> Self:
        """Return the manifest with its hash, which covers everything except the paths of files, the handling of records that are
        too long, and the keys that were not read.
        """
        # What is left out does not change the ids, so that a set that is moved or renamed stays the same set.
        content = self.model_dump(
            mode="json", exclude={"hash": True, "too_long": True, "unread": True, "files": {"__all__": {"path"}}}
        )
        # Sets from before there was such a date, a teacher, pictures or sound keep their hash.
        if self.rules.chat_date is None:
            del content["rules"]["chat_date"]
        if self.teacher is None:
            del content["teacher"]
        if self.media is None:
            del content["media"]
        return self.model_copy(update={"hash": _sha256(content)})

    def write(self, directory: Path) -> None:
        """Write the manifest into a folder."""
        write_text(directory / MANIFEST, self.model_dump_json(indent=1) + "\n")


def read_manifest(text: str | bytes, location: str) -> Manifest:
    """Parse and verify a manifest.

    Args:
        text: The content of the file.
        location: The file's path, for messages.

    Raises:
        ValueError: In one line, if the text is not a manifest, has another layout, or was changed after it was written.
    """
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{location} is no manifest that this version reads: {key}: {first['msg']}; prepare the data again"
        ) from error
    if any(json.loads(text).get(name) is not None for name in _OLDER_FIELDS):
        raise ValueError(
            f"{location} was written by an earlier version, which stored pictures and sound in other files; prepare the data again"
        )
    # The hash covers the hash of each shard, so it pins the tokens too.
    if manifest.sealed().hash != manifest.hash:
        raise ValueError(f"{location} was changed after it was written: its hash is another; prepare the data again")
    return manifest


def hash_of_all(manifests: list[Manifest]) -> str:
    """Return one hash over the prepared sets that a run trains on."""
    if len(manifests) == 1:
        return manifests[0].hash
    return _sha256([manifest.hash for manifest in manifests])


def text_of_all(manifests: list[Manifest]) -> str:
    """Return JSON with that hash under `hash`, and the manifests under `sets`."""
    sets = [manifest.model_dump(mode="json") for manifest in manifests]
    return json.dumps({"hash": hash_of_all(manifests), "sets": sets}, indent=1, ensure_ascii=False) + "\n"


def _sha256(value: Json) -> str:
    """Return the sha256 of a value's JSON form."""
    # Sorted, so that the order in which fields are declared does not decide the hash.
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
