"""The bytes of files: unpacked by their suffix, and what is said of bytes that cannot be read."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import pytest

from moe_train.data.records import file_bytes
from moe_train.data.records.file_bytes import is_compressed, looks_like_utf16, not_utf8
from tests.data.records.sources import PACKED, opened, texts, zstd


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8 .*0xff"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), r"a\.jsonl:1: not UTF-8 \(it looks like UTF-16\)"),
        ("a.jsonl", '{"text": 1\n'.encode("utf-16-le"), r"a\.jsonl:1: not UTF-8 \(it looks like UTF-16\)"),
        ("a.txt", b"a\nb\n\xff", r"a\.txt:3: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20], r"a\.jsonl\.gz:\d+: cannot be unpacked to its end"),
        ("a.jsonl.bz2", bz2.compress(b'{"text": "a"}\n' * 1000)[:-20], r"a\.jsonl\.bz2:\d+: cannot be unpacked to its end"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 1000)[:-20], r"a\.jsonl\.xz:\d+: cannot be unpacked to its end"),
        ("a.jsonl.zst", zstd(b'{"text": "a"}\n' * 1000)[:-2], r"a\.jsonl\.zst:\d+: cannot be unpacked to its end"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz:1: not compressed as \.gz is; give the file the ending"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-32"), r"not UTF-8 \(it looks like UTF-32\)"),
    ],
)
def test_what_is_malformed_is_named_by_file_and_line(tmp_path: Path, name: str, content: bytes, error: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=error):
        texts(opened(tmp_path / name))


@pytest.mark.parametrize("suffix", ["", *PACKED])
def test_a_file_is_unpacked_by_its_suffix(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACKED[suffix](b"some bytes") if suffix else b"some bytes")
    with file_bytes.open_bytes(path) as stream:
        assert stream.read() == b"some bytes"
    assert is_compressed(path) == bool(suffix)


def test_a_missing_file_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), file_bytes.open_bytes(tmp_path / "a.gz"):
        pass


def test_a_byte_is_counted_from_the_start_of_the_file() -> None:
    with pytest.raises(UnicodeDecodeError) as caught:
        b"ab\xff".decode()
    assert str(not_utf8(caught.value, before=10)).startswith("not UTF-8 (invalid start byte, byte 0xff at 12); save it as UTF-8")


NO_TEXT = [(compress(b"a"), suffix[1:2]) for suffix, compress in PACKED.items()]


@pytest.mark.parametrize(
    ("data", "name"), [*NO_TEXT, (b"PAR1", "Parquet"), (b"\xff\xfea\0", "UTF-16"), (b"\xff\xfe\0\0a", "UTF-32")]
)
def test_a_file_of_another_format_is_known_by_its_first_bytes(data: bytes, name: str) -> None:
    with pytest.raises(UnicodeDecodeError) as caught:
        (data + b"\xff").decode()
    assert f"it looks like {name}" in str(not_utf8(caught.value))


@pytest.mark.parametrize(
    ("line", "expected"), [(b'{"a": 1}', False), ("{}".encode("utf-16-le"), True), (b"\0", True), (b"a\0" + b"b" * 9, False)]
)
def test_half_of_utf_16_is_nul(line: bytes, expected: bool) -> None:
    assert looks_like_utf16(line) == expected
