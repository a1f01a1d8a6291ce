"""Read records from files, for programs that use this package as a library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_train import config
from moe_train.data.records.local_files import LocalFiles


def load_records(*files: str, record: config.Record | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of files with their locations, such as `("chats.jsonl:17", {"messages": […]})`.

        for where, fields in moe_train.load_records("data/*.jsonl", "more.parquet"):
            print(where, sorted(fields))

    Args:
        files: Paths, folders or globs, in the formats that training reads.
        record: The columns to read from columnar files and the name of a text file's column; None for the column `text`.

    Raises:
        FileNotFoundError: If a path matches nothing.
        ValueError: If a format is not known, or, with its location, for the first malformed record.
    """
    section = record or config.TextRecord(name="text")
    source = LocalFiles(config.FileSource(name="files", files=files, record=section))
    for origin, fields in source:
        yield source.where(origin), fields
