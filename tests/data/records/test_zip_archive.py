"""Zip archives: their members are files, and what is unsafe, too large or packed once more is refused."""

from __future__ import annotations

import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train.data.records import zip_archive
from moe_train.data.records.scan import scan_file
from tests.data.records.sources import ROWS, opened, texts, wheres

pytestmark = pytest.mark.usefixtures("no_network")
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def archive(path: Path, members: dict[str, str | bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as opened_archive:
        for name, content in members.items():
            opened_archive.writestr(name, content)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_are_files_with_places_of_their_own(tmp_path: Path, method: int) -> None:
    ignored = {"README.md": "x", "__MACOSX/._a.jsonl": "x", "d/.hidden.jsonl": "x", "picture.png": "x", "d/": b""}
    path = archive(tmp_path / "a.zip", {"d/a.jsonl": LINES, "b.csv": "text\nvier\n", **ignored}, method)
    records = opened(path)
    assert texts(records) == ["vier", "one", "zwei, ü", "三"]
    assert wheres(records)[:2] == [f"{path}/b.csv: row 1", f"{path}/d/a.jsonl:1"]


def test_an_archive_in_a_folder_and_paths_in_an_archive(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"d/x-1.jsonl": LINES, "d/x-2.jsonl": LINES, "y.jsonl": '{"text": "y"}'})
    assert len(texts(opened(tmp_path))) == len(texts(opened(tmp_path / "*.zip"))) == 7
    assert texts(opened(path / "y.jsonl")) == ["y"]
    assert len(texts(opened(path / "d"))) == len(texts(opened(path / "d/x-*.jsonl"))) == len(texts(opened(path / "d/*"))) == 6
    for missing in ("z.jsonl", "z/*.jsonl", "*.txt"):
        with pytest.raises(FileNotFoundError, match="no file matches"):
            opened(path / missing)


def test_a_member_is_identified_by_its_content(tmp_path: Path) -> None:
    plain = tmp_path / "a.jsonl"
    plain.write_text(LINES)
    path = archive(tmp_path / "a.zip", {"a.jsonl": LINES})
    assert scan_file(path / "a.jsonl", False, tmp_path / "memory").sha256 == scan_file(plain, False, tmp_path / "memory").sha256


def link(info: zipfile.ZipInfo) -> None:
    info.create_system = 3
    info.external_attr = (stat.S_IFLNK | 0o777) << 16


def encrypted(info: zipfile.ZipInfo) -> None:
    info.flag_bits |= 1


def harmless(info: zipfile.ZipInfo) -> None:
    """Change nothing."""


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("../a.jsonl", harmless, "is no path below the archive"),
        ("/a.jsonl", harmless, "is no path below the archive"),
        ("C:/a.jsonl", harmless, "is no path below the archive"),
        ("d//a.jsonl", harmless, "is no path below the archive"),
        ("a\n.jsonl", harmless, "has a name that cannot be printed"),
        ("a.jsonl.gz", harmless, "is packed once more"),
        ("inner.ZIP", harmless, "is packed once more"),
        ("a.jsonl", link, "is a link"),
    ],
)
def test_an_unsafe_member_refuses_the_archive(
    tmp_path: Path, name: str, change: Callable[[zipfile.ZipInfo], None], fault: str
) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as opened_archive:
        info = zipfile.ZipInfo("x")
        info.filename = name
        change(info)
        opened_archive.writestr(info, LINES)
    with pytest.raises(ValueError, match=rf"a\.zip: has the member .*, which {fault}; unpack the archive") as caught:
        opened(tmp_path / "a.zip")
    assert "\n" not in str(caught.value)


def test_an_encrypted_member_refuses_the_archive(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"a.jsonl": LINES})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="which is encrypted"):
        opened(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_sizes_and_numbers_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = archive(tmp_path / "a.zip", {"a.jsonl": '{"text": "' + "a" * 500_000 + '"}'})
    assert len(texts(opened(bomb))[0]) == 500_000, "small archives may be as dense as they like"
    monkeypatch.setattr(zip_archive, "_SMALL", 1000)
    zip_archive._read_directory.cache_clear()
    with pytest.raises(ValueError, match=r"a\.zip: expands from \d+ to 500012 bytes, more than 100 times its size; unpack"):
        opened(bomb)
    monkeypatch.setattr(zip_archive, "MAX_MEMBERS", 1)
    with pytest.raises(ValueError, match="has 2 members, more than 1"):
        opened(archive(tmp_path / "b.zip", {"a.jsonl": LINES, "b.jsonl": LINES}))
    monkeypatch.undo()
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as twice:
        twice.writestr("a.jsonl", LINES)
        twice.writestr("a.jsonl", LINES)
    with pytest.raises(ValueError, match=r"has two members named 'a\.jsonl'"):
        opened(tmp_path / "c.zip")


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"a.jsonl": LINES * 100})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"^.*a\.zip: cannot be read as a zip archive \(File is not a zip file\)"):
        opened(path)
    damaged = bytearray(whole)
    damaged[60] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"a\.zip/a\.jsonl:1: cannot be unpacked to its end .* cut short"):
        texts(opened(path))
    with pytest.raises(ValueError, match=r"a\.zip/a\.jsonl: cannot be unpacked"):
        opened(path).scan(tmp_path)
