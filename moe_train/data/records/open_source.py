"""Sections of a config opened as sources of records."""

from __future__ import annotations

from collections.abc import Iterator

from moe_train import config
from moe_train.data.records.hub import HubDataset
from moe_train.data.records.local_files import LocalFiles
from moe_train.data.records.problem import located, text_field
from moe_train.data.records.python_source import PythonRecords
from moe_train.data.records.source import OpenSource


def open_source(source: config.RecordSource) -> OpenSource:
    """The records of a config section.

    Raises FileNotFoundError for a path that matches nothing, ValueError for a format that is not known. Reading raises
    ValueError with file and line (or row) for what is malformed.
    """
    match source:
        case config.FileSource():
            return LocalFiles(source)
        case config.HubSource():
            return HubDataset(source)
        case config.PythonSource():
            return PythonRecords(source)


def texts(source: config.RecordSource) -> Iterator[str]:
    """The text of every text record of a source, as for training a tokenizer."""
    if not isinstance(source.record, config.TextRecord):
        raise ValueError(f"plain text is needed, not {source.record.name} records; use record: {{name: text}}")
    records = open_source(source)
    for origin, fields in records:
        yield located(records.where(origin), text_field, fields, source.record.column)
