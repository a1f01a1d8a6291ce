"""Records with their origin, from local files or the hub, in a fixed order.

JSON is read line by line here, so that an error names its line and no column changes its type on the way; Parquet,
Arrow and the hub are read by the `datasets` library. Local files never cause network traffic.
"""

from __future__ import annotations

import functools
import glob
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from moe_train import config
from moe_train.data.conversation import columns
from moe_train.data.fields import located, text_field

_FORMATS = {
    ".txt": "text", ".md": "text", ".rst": "text", ".json": "json", ".jsonl": "json", ".ndjson": "json",
    ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
# What `datasets` writes beside its Arrow files (save_to_disk), and is no data.
_BOOKKEEPING = {"dataset_info.json", "dataset_dict.json", "state.json"}


class Origin(NamedTuple):
    """Where a record stands: which place of its `Records`, and which line (JSON lines) or row, counted from 1."""

    place: int
    number: int


class Span(NamedTuple):
    """Records of a place that stand together: bytes `start` to `stop` (None: the end), where line `line` begins.

    Only JSON lines that are not compressed can be read from anywhere but their start.
    """

    place: int
    start: int = 0
    stop: int | None = None
    line: int = 1


@dataclass(frozen=True)
class Records:
    """The records of one source; iterating reads them anew, always in the same order.

    places: names for error messages; files: local places, with their formats in `kinds`; cuttable: whether any `Span` of
    it can be read; pinned: what fixes the content where it is not in local files.
    """

    places: tuple[str, ...]
    by_line: tuple[bool, ...]
    read: Callable[[Span], Iterator[tuple[int, dict[str, Any]]]]
    files: tuple[Path, ...] = ()
    kinds: tuple[str, ...] = ()
    cuttable: tuple[bool, ...] = ()
    pinned: str | None = None

    @functools.cached_property
    def identity(self) -> str:
        """Hash of the content (for the hub: of name and commit), wherever it lies. Reads all files."""
        content = hashlib.sha256((self.pinned or "").encode())
        for file, kind in zip(self.files, self.kinds, strict=True):
            with file.open("rb") as stream:
                content.update(kind.encode() + hashlib.file_digest(stream, "sha256").digest())
        return content.hexdigest()

    def __iter__(self) -> Iterator[tuple[Origin, dict[str, Any]]]:
        for place in range(len(self.places)):
            for number, record in self.read(Span(place)):
                yield Origin(place, number), record

    def where(self, origin: Origin) -> str:
        """`path:line`, or `path: row N`."""
        separator = ":" if self.by_line[origin.place] else ": row "
        return f"{self.places[origin.place]}{separator}{origin.number}"


def open_source(source: config.Source) -> Records:
    """The records of a config section.

    Raises FileNotFoundError for a path that matches nothing, ValueError for a format that is not known. Reading raises
    ValueError with file and line (or row) for what is malformed.
    """
    match source:
        case config.FileSource():
            return _open_files(source)
        case config.HubSource():
            return _open_hub(source)


def texts(source: config.Source) -> Iterator[str]:
    """The text of every text record of a source, as for training a tokenizer."""
    if not isinstance(source.record, config.TextRecord):
        raise ValueError(f"plain text is needed, not {source.record.name} records; use record: {{name: text}}")
    records = open_source(source)
    for origin, fields in records:
        yield located(records.where(origin), text_field, fields, source.record.column)


# --- local files -----------------------------------------------------------------------------------------------


def _open_files(source: config.FileSource) -> Records:
    files = _resolve(source)
    wanted = columns(source.record)

    def read(span: Span) -> Iterator[tuple[int, dict[str, Any]]]:
        file, kind = files[span.place]
        match kind:
            case "text":
                with _opened(file) as stream:
                    text = stream.read()
                yield 1, {wanted[0]: _decode(text, file)}
            case "json":
                yield from _read_json_array(file) if span.start == 0 and _is_array(file) else _read_json_lines(file, span)
            case _:
                yield from _read_columns(file, kind, wanted)

    lines = [kind == "json" and not _is_array(file) for file, kind in files]
    return Records(
        places=tuple(str(file) for file, _ in files),
        by_line=tuple(kind == "text" or by_line for (_, kind), by_line in zip(files, lines, strict=True)),
        read=read,
        files=tuple(file for file, _ in files),
        kinds=tuple(kind for _, kind in files),
        cuttable=tuple(by_line and file.suffix.lower() != ".gz" for (file, _), by_line in zip(files, lines, strict=True)),
    )


def _resolve(source: config.FileSource) -> list[tuple[Path, str]]:
    """Each file once, with its format, in the order of the patterns and sorted within one."""
    found: dict[Path, str] = {}
    for pattern in source.files:
        path = Path(pattern).expanduser()
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.is_file() and not _left_out(file.relative_to(path))]
            files = [file for file in inside if source.format != "auto" or _suffix(file) in _FORMATS]
        elif path.is_file():
            files = [path]
        else:
            files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
        if not files:
            raise FileNotFoundError(f"data: no file matches {pattern} (looked in {Path.cwd()})")
        for file in files:
            if file in found:
                raise ValueError(f"data: {file} is named twice in files; name it once (weight sets how often it is seen)")
            found[file] = _format(file) if source.format == "auto" else source.format
    if isinstance(source.record, config.ChatRecord | config.CompletionRecord):
        for file, kind in found.items():
            if kind == "text":
                raise ValueError(f"{file} is plain text, which has no {source.record.name} records; use record: {{name: text}}")
    return list(found.items())


def _left_out(path: Path) -> bool:
    return path.name in _BOOKKEEPING or any(part.startswith(".") for part in path.parts)


def _suffix(file: Path) -> str:
    return Path(file.stem).suffix.lower() if file.suffix.lower() == ".gz" else file.suffix.lower()


def _format(file: Path) -> str:
    kind = _FORMATS.get(_suffix(file))
    if kind is None:
        raise ValueError(f"{file}: no format goes with its name ({', '.join(_FORMATS)}, json and text also as .gz); state format")
    return kind


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    try:
        with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as stream:
            yield stream  # type: ignore[misc]
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{file}: cannot be read to its end ({error}); is it cut short?") from error


def _decode(text: bytes, file: Path, line: int = 1) -> str:
    try:
        return text.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += text.count(b"\n", 0, error.start)
        raise ValueError(f"{file}:{line}: not UTF-8 ({error.reason}, byte {error.object[error.start]:#04x})") from error


def _is_array(file: Path) -> bool:
    with _opened(file) as stream:
        for line in stream:
            text = line.removeprefix(b"\xef\xbb\xbf").strip()
            if text:
                return text.startswith(b"[")
    return False


def _parsed(text: str, file: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{line + error.lineno - 1}: not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError(f"{file}:{line}: not JSON: nested too deeply") from error


def _read_json_lines(file: Path, span: Span) -> Iterator[tuple[int, dict[str, Any]]]:
    with _opened(file) as stream:
        stream.seek(span.start)
        at = span.start
        for number, line in enumerate(stream, start=span.line):
            if span.stop is not None and at >= span.stop:
                return
            at += len(line)
            if not line.strip():
                continue
            record = _parsed(_decode(line, file, number).strip(), file, number)
            if not isinstance(record, dict):
                raise ValueError(f"{file}:{number}: a record should be an object {{…}}, not {type(record).__name__}")
            yield number, record


def _read_json_array(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with _opened(file) as stream:
        records = _parsed(_decode(stream.read(), file), file, 1)
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(f"{file}: row {number}: a record should be an object {{…}}, not {type(record).__name__}")
        yield number, record


def _read_columns(file: Path, kind: str, wanted: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets

    try:
        rows = datasets.load_dataset(kind, data_files=glob.escape(str(file)), split="train", streaming=True)
        present = [name for name in rows.column_names or () if name in wanted]
        if present:  # others (images, embeddings) are not decoded
            rows = rows.select_columns(present)
        for number, row in enumerate(rows, start=1):
            yield number, dict(row)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        raise ValueError(f"{file}: cannot be read as {kind} ({error})") from error


# --- the hub ---------------------------------------------------------------------------------------------------


def _open_hub(source: config.HubSource) -> Records:
    if not re.fullmatch(r"[0-9a-f]{40}", source.revision):
        raise ValueError(f"data: revision {source.revision} of {source.dataset} can move; state the commit (40 hex digits)")
    name = "/".join(filter(None, (f"hub:{source.dataset}@{source.revision}", source.subset, source.split)))

    def read(_: Span) -> Iterator[tuple[int, dict[str, Any]]]:
        import datasets

        try:
            rows = datasets.load_dataset(source.dataset, source.subset, split=source.split, revision=source.revision)
        except (OSError, ValueError) as error:  # the library's own errors are of these kinds
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(f"{name} cannot be had ({reason}); fetch it where there is a network, or use files") from error
        present = [column for column in rows.column_names if column in columns(source.record)]
        for number, row in enumerate(rows.select_columns(present) if present else rows, start=1):
            yield number, dict(row)

    return Records(places=(name,), by_line=(False,), read=read, pinned=name)
