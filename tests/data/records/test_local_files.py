"""Local files: which ones a path, a folder or a glob names, and in which order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_train import config
from moe_train.data.records.local_files import expand_files, suffixes_in_words
from tests.data.records.sources import opened, texts

pytestmark = pytest.mark.usefixtures("no_network")


def files_section(pattern: Path) -> config.FileSource:
    return config.FileSource(name="files", files=(str(pattern),), record=config.TextRecord(name="text"))


def test_folders_and_globs_come_sorted_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.txt", "a.md", ".hidden.txt", ".git/x.txt", "b/picture.png", "c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(opened(tmp_path)) == ["a.md", "b/10.txt", "b/2.txt"]
    assert texts(opened(tmp_path / "*" / "*.txt")) == ["b/10.txt", "b/2.txt"]
    assert texts(opened(tmp_path / "c.py", format="text")) == ["c.py"]


def test_files_of_unknown_formats_in_a_folder_are_named(tmp_path: Path) -> None:
    for name in ("a.txt", "b.xls", "d/c.PDF", "d/e.pdf", "README.md", ".hidden", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    for pattern in (tmp_path, tmp_path.parent / f"{tmp_path.name}*"):
        assert [path.name for path in expand_files(files_section(pattern)).left_out] == ["b.xls", "c.PDF", "e.pdf"]
    assert suffixes_in_words(expand_files(files_section(tmp_path)).left_out) == ".pdf (2 files), .xls (1)"
    with pytest.raises(FileNotFoundError, match=r"d has no file of a known format, only \.pdf \(2 files\)"):
        opened(tmp_path / "d")


def test_files_that_are_not_there_or_not_known(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.xls").write_text("a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^data: s3://bucket/\*.jsonl is a URL; records are read from this machine's"):
        opened("s3://bucket/*.jsonl")
    for missing in ("nothing.jsonl", "*.parquet"):
        with pytest.raises(FileNotFoundError, match="no file matches"):
            opened(tmp_path / missing)
    with pytest.raises(FileNotFoundError, match="empty holds no file"):
        opened(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"a\.xls: no format goes with its name .*--format"):
        opened(tmp_path / "a.xls")
    (tmp_path / "a.parquet.gz").write_text("a")
    with pytest.raises(ValueError, match="parquet is compressed inside"):
        opened(tmp_path / "a.parquet.gz")
    with pytest.raises(ValueError, match="named twice"):
        opened(tmp_path / "a.txt", tmp_path / "*.txt")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match=r"pipe\.jsonl: a pipe or a device can be read only once"):
        opened(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match="plain text, which has no chat records"):
        opened(tmp_path / "a.txt", record=config.ChatRecord(name="chat"))


def test_json_lines_with_the_name_of_a_text(tmp_path: Path) -> None:
    file = tmp_path / "records.txt"
    for line in ('{"text": "a"}', '\ufeff {"messages": []}'):
        file.write_text(line + "\n" + line, encoding="utf-8")
        with pytest.raises(ValueError, match=r"records\.txt: .* first line is a JSON object; state --format json"):
            expand_files(files_section(file))
        for stated in ("json", "text"):
            assert expand_files(files_section(file).model_copy(update={"format": stated})).files == [(file, stated)]
    for text in ("{} is empty", "{}", '{"a": 1', "plain"):
        file.write_text(text, encoding="utf-8")
        assert texts(opened(file)) == [text]
