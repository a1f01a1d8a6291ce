"""Records in every container that people use: each writer makes a file or folder of them with the libraries of the field.

A writer raises `CannotHold` where its container cannot express the records, such as values of two types in one column.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

Record = dict[str, Any]


class CannotHold(Exception):
    """A container that cannot express some records."""


def json_text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def lines(records: Sequence[Record]) -> bytes:
    return "".join(json_text(record) + "\n" for record in records).encode()


def _bytes(suffix: str, encode: Callable[[Sequence[Record]], bytes]) -> Callable[[Sequence[Record], Path], Path]:
    """A writer of files of one suffix."""

    def write(records: Sequence[Record], folder: Path) -> Path:
        path = folder / f"records{suffix}"
        path.write_bytes(encode(records))
        return path

    return write


def _zipped(records: Sequence[Record], inner: str, content: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/README.md", "# Tides")
        archive.writestr(inner, content)
    return sink.getvalue()


def _json_values(value: Any) -> Any:
    """A value without objects that a struct cannot hold as they are: nulls in objects would be lost."""
    if isinstance(value, Mapping):
        if any(item is None for item in value.values()):
            raise CannotHold("a null in an object")
        return {key: _json_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_values(item) for item in value]
    return value


def struct_table(records: Sequence[Record]) -> pa.Table:
    """A table with a column for each key and structs for objects, as pyarrow infers it."""
    names = list(dict.fromkeys(name for record in records for name in record))
    try:
        columns = [pa.array([_json_values(record.get(name)) for record in records]) for name in names]
        return pa.table(dict(zip(names, columns, strict=True)))
    except (pa.ArrowException, OverflowError, ValueError, TypeError) as error:
        raise CannotHold(str(error)) from error


def json_table(records: Sequence[Record]) -> pa.Table:
    """A table whose lists and objects are in columns of the type `arrow.json`."""
    names = list(dict.fromkeys(name for record in records for name in record))
    columns: dict[str, pa.Array] = {}
    for name in names:
        values = [record.get(name) for record in records]
        if all(value is None or isinstance(value, str) for value in values):
            columns[name] = pa.array(values, pa.string())
        else:
            storage = pa.array([None if value is None else json_text(value) for value in values], pa.string())
            columns[name] = pa.ExtensionArray.from_storage(pa.json_(pa.string()), storage)
    return pa.table(columns)


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    try:
        pyarrow.parquet.write_table(table, sink, row_group_size=2)
    except (pa.ArrowException, NotImplementedError) as error:  # a struct without members
        raise CannotHold(str(error)) from error
    return sink.getvalue()


def _arrow(table: pa.Table, stream: bool = False) -> bytes:
    sink = io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def _dataset(records: Sequence[Record], **settings: Any) -> datasets.Dataset:
    _json_values(list(records))
    # from_list takes the columns of the first record alone.
    names = dict.fromkeys(name for record in records for name in record)
    try:
        return datasets.Dataset.from_list([dict.fromkeys(names) | record for record in records], **settings)
    except (pa.ArrowException, OverflowError, ValueError, TypeError) as error:
        raise CannotHold(str(error)) from error


def _saved(records: Sequence[Record], folder: Path) -> Path:
    _dataset(records).save_to_disk(str(folder / "saved"))
    (folder / "saved" / "cache-0123.arrow").write_bytes(b"no records")
    return folder / "saved"


def _saved_json(records: Sequence[Record], folder: Path) -> Path:
    _dataset(records, on_mixed_types="use_json").save_to_disk(str(folder / "saved"))
    return folder / "saved"


def _saved_dict(records: Sequence[Record], folder: Path) -> Path:
    dataset = _dataset(records)
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(str(folder / "saved"))
    return folder / "saved" / "test"


def _clone(records: Sequence[Record], folder: Path) -> Path:
    (folder / "data").mkdir()
    try:
        _dataset(records).to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    except (pa.ArrowException, NotImplementedError) as error:  # a struct without members
        raise CannotHold(str(error)) from error
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n# Tides\n"
    (folder / "README.md").write_text(card)
    (folder / "dataset_infos.json").write_text("{}")
    return folder


KEEP_ALL: dict[str, Callable[[Sequence[Record], Path], Path]] = {
    "json lines": _bytes(".jsonl", lines),
    ".ndjson": _bytes(".ndjson", lambda records: b"\xef\xbb\xbf" + lines(records).replace(b"\n", b"\r\n")),
    ".jsonlines": _bytes(".jsonlines", lines),
    "gzip": _bytes(".jsonl.gz", lambda records: gzip.compress(lines(records))),
    "bzip2": _bytes(".jsonl.bz2", lambda records: bz2.compress(lines(records))),
    "xz": _bytes(".json.xz", lambda records: lzma.compress(lines(records))),
    "zstandard": _bytes(".jsonl.zst", lambda records: pa.Codec("zstd").compress(lines(records), asbytes=True)),
    "array": _bytes(".json", lambda records: json_text(records).encode()),
    "pretty array": _bytes(".json", lambda records: json.dumps(records, indent=2).encode()),
    "pretty objects": _bytes(".json", lambda records: "\n".join(json.dumps(record, indent=1) for record in records).encode()),
    "data": _bytes(".json", lambda records: json_text({"version": "1", "data": records}).encode()),
    "pretty data": _bytes(".json", lambda records: json.dumps({"train": records}, indent=4).encode()),
    "zip of lines": _bytes(".zip", lambda records: _zipped(records, "data/a.jsonl", lines(records))),
    "zip of JSON": _bytes(".zip", lambda records: _zipped(records, "a.json", json_text(records).encode())),
    "zip of Parquet": _bytes(".zip", lambda records: _zipped(records, "a.parquet", _parquet(json_table(records)))),
    "Parquet of JSON": _bytes(".parquet", lambda records: _parquet(json_table(records))),
    "Arrow of JSON": _bytes(".arrow", lambda records: _arrow(json_table(records))),
}
"""Containers that keep everything, the order of keys included."""

TYPED: dict[str, Callable[[Sequence[Record], Path], Path]] = {
    "Parquet": _bytes(".parquet", lambda records: _parquet(struct_table(records))),
    "Arrow file": _bytes(".arrow", lambda records: _arrow(struct_table(records))),
    "Arrow stream": _bytes(".arrow", lambda records: _arrow(struct_table(records), stream=True)),
    "zip of Arrow": _bytes(".zip", lambda records: _zipped(records, "a.arrow", _arrow(struct_table(records)))),
    "save_to_disk": _saved,
    "save_to_disk with JSON": _saved_json,
    "split of save_to_disk": _saved_dict,
    "hub clone": _clone,
}
"""Containers whose columns have types: they lose the order of keys, and nulls in objects."""


def as_text(record: Record) -> Record:
    """A record as a table of text holds it: lists and objects as JSON text, and an empty text like a missing one."""
    values = {name: value if isinstance(value, str) else json_text(value) for name, value in record.items()}
    return {name: value for name, value in values.items() if value}


def _table_of_text(records: Sequence[Record], delimiter: str) -> bytes:
    names = list(dict.fromkeys(name for record in records for name in record))
    sink = io.StringIO(newline="")
    writer = csv.DictWriter(sink, names, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(as_text(record) for record in records)
    return sink.getvalue().encode()


def _pandas(records: Sequence[Record], folder: Path) -> Path:
    # pandas leaves a carriage return without quotes, and readers take it for the end of the line.
    if any("\r" in value for record in records for value in as_text(record).values()):
        raise CannotHold("a carriage return")
    pd.DataFrame([as_text(record) for record in records]).to_csv(folder / "records.csv", index=False)
    return folder / "records.csv"


TEXT: dict[str, Callable[[Sequence[Record], Path], Path]] = {
    "CSV": _bytes(".csv", lambda records: _table_of_text(records, ",")),
    "TSV": _bytes(".tsv", lambda records: _table_of_text(records, "\t")),
    "CSV, gzip": _bytes(".csv.gz", lambda records: gzip.compress(_table_of_text(records, ","))),
    "zip of TSV": _bytes(".zip", lambda records: _zipped(records, "a.tsv", _table_of_text(records, "\t"))),
    "pandas": _pandas,
}
"""Containers of text, which hold what `as_text` gives."""
