"""Tables as files of every kind, and JSON columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet


def json_array(values: Sequence[str | None]) -> pa.Array:
    """An array of the extension type `arrow.json`."""
    return pa.ExtensionArray.from_storage(pa.json_(pa.string()), pa.array(values, pa.string()))


def write_table(table: pa.Table, path: Path) -> Path:
    """Write a table to a Parquet or Arrow file, by the name of the file."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return path
