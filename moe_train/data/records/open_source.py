"""Open the source sections of a config as sources of records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from moe_train import config
from moe_train.data.records import files
from moe_train.data.records.hub import HubDataset
from moe_train.data.records.local_files import LocalFiles, expand_files
from moe_train.data.records.problem import Problem, text_field
from moe_train.data.records.python_source import PythonRecords
from moe_train.data.records.source import OpenSource, numbered


def open_source(source: config.RecordSource) -> OpenSource:
    """Open the records of a config section.

    Reading them raises ValueError, with file and line (or row), for a malformed record.

    Raises:
        FileNotFoundError: If a path matches nothing.
        ValueError: If a format is not known.
    """
    match source:
        case config.FileSource():
            return LocalFiles(source)
        case config.HubSource():
            return HubDataset(source)
        case config.PythonSource():
            return PythonRecords(source)


def first_record(paths: Sequence[str], file_format: str = "auto") -> tuple[str, dict[str, Any]] | None:
    """Read the first record of files, with all of its columns.

    Returns:
        Where it is, for messages, and its columns; None if the files have no record.

    Raises:
        FileNotFoundError: If a path matches nothing.
        ValueError: If the record is malformed, or a format is not known.
    """
    section = {"name": "files", "files": tuple(paths), "format": file_format, "record": {"name": "text"}}
    for file, kind in expand_files(config.FileSource.model_validate(section)).files:
        by_line = kind == "text" or files.is_json_lines(file, kind)
        for number, item in files.read_file(file, kind, by_line, "text"):
            location = numbered(str(file), number, by_line)
            if isinstance(item, Problem):
                raise ValueError(f"{location}: {item}") from item
            return location, item
    return None


def texts(source: config.RecordSource) -> Iterator[str]:
    """Yield the text of every text record of a source, for training a tokenizer.

    Raises:
        ValueError: If the records of the source are not texts.
    """
    if not isinstance(source.record, config.TextRecord):
        raise ValueError(f"plain text is needed, not {source.record.name} records; use record: {{name: text}}")
    records = open_source(source)
    for origin, fields in records:
        try:
            yield text_field(fields, source.record.column)
        except Problem as problem:
            remedy = "name the column of the text with --column" if problem.rule == "columns" else problem.remedy
            raise ValueError(f"{records.where(origin)}: {problem.message}; {remedy}") from problem
