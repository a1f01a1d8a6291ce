"""The corrected copy: good records as they were, others repaired or dropped, every change on record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.data.check import corrected
from moe_train.data.check.check import check_data
from moe_train.data.check.settings import CheckSettings
from moe_train.data.check.sources import CheckedSource
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.check.samples import ANSWER, CHAT, LINES, USER, Write, check_files


def test_the_corrected_copy(tokenizer: HuggingFace, tmp_path: Path) -> None:
    source = tmp_path / "data" / "sub"
    source.mkdir(parents=True)
    good = b'{ "text":"kept as it is",  "id": 1 }'
    fixable = {"messages": [USER, USER, ANSWER, USER], "id": 2}
    lines = [good, *(line for line, _ in LINES), json.dumps(fixable).encode()]
    (source / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    (source.parent / "b.csv").write_text("question,answer,id\na\0b,5,7\n")
    before = {file: file.read_bytes() for file in source.parent.rglob("*.*")}
    out = tmp_path / "out"
    allowed = frozenset({"mixed-kinds"})
    answer = check_files(tokenizer, tmp_path / "data", seq_len=128, fix=out, ignore=("id",), allowed=allowed)
    assert {file: file.read_bytes() for file in source.parent.rglob("*.*")} == before
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*.*")) == ["b.csv.jsonl", "changes.log", "sub/a.jsonl"]

    kept = (out / "sub" / "a.jsonl").read_bytes().splitlines()
    assert kept[:2] == [good, b'{"text": "a"}']
    assert json.loads(kept[-1]) == {"messages": [USER | {"content": "What is 2 + 3?\n\nWhat is 2 + 3?"}, ANSWER], "id": 2}
    assert json.loads((out / "b.csv.jsonl").read_text()) == {"question": "a\ufffdb", "answer": "5", "id": "7"}
    changes = [json.loads(line) for line in (out / "changes.log").read_text().splitlines()]
    assert {change["action"] for change in changes} == {"changed", "left", "dropped"}
    assert all(set(change) == {"where", "action", "rule", "what"} for change in changes)
    dropped = {change["where"] for change in changes if change["action"] == "dropped"}
    changed = {change["where"] for change in changes if change["action"] == "changed"}
    left = {change["where"] for change in changes if change["action"] == "left"}
    counts = {"changed": len(changed), "left": len(left), "dropped": len(dropped)}
    assert answer["fixed"] == {"directory": str(out), "kept": len(kept) + 1, **counts}
    assert len(kept) + 1 + len(dropped) == answer["records"]
    last = f"{source / 'a.jsonl'}:{len(lines)}"
    assert [change["rule"] for change in changes if change["where"] == last] == ["role-order", "last-turn"]

    again = check_files(tokenizer, out, seq_len=128, allowed=allowed)
    assert again["records_with_problems"] == len(left) and again["records"] == answer["fixed"]["kept"]


def test_a_copy_appears_whole_or_not_at_all(tokenizer: HuggingFace, write_lines: Write, tmp_path: Path) -> None:
    path = write_lines("a.jsonl", [CHAT, CHAT])

    def interrupted(bytes_read: int, total: int, records: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        settings = CheckSettings(template=tokenizer.chat_template, fix=tmp_path / "out")
        check_data([CheckedSource((str(path),))], tokenizer, settings, interrupted)
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FileExistsError):
        check_files(tokenizer, path, fix=tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_names_of_copies() -> None:
    paths = ["/d/a.jsonl", "/d/a.jsonl.gz", "/d/x/b.parquet", "/d/x/b.txt.zst"]
    assert corrected._copy_names([Path(path) for path in paths]) == [
        *("a.jsonl", "a-2.jsonl", "x/b.parquet.jsonl", "x/b.txt.jsonl")
    ]
