"""Records as files of every format, and what a source reads of them."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from moe_train import config
from moe_train.data.records.open_source import open_source
from moe_train.data.records.source import OpenSource

ROWS = [{"text": "one"}, {"text": "zwei, ü"}, {"text": "三"}]
TEXT = config.TextRecord(name="text")


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def opened(*files: str | Path, **settings: object) -> OpenSource:
    section = {"name": "files", "files": tuple(map(str, files)), "record": TEXT} | settings
    return open_source(config.FileSource.model_validate(section))


def texts(records: OpenSource) -> list[str]:
    return [record["text"] for _, record in records]


def wheres(records: OpenSource) -> list[str]:
    return [records.where(origin) for origin, _ in records]


def hub(**settings: object) -> OpenSource:
    section = {"name": "hub", "dataset": "nobody/nothing", "revision": "0" * 40, "record": TEXT} | settings
    return open_source(config.HubSource.model_validate(section))
