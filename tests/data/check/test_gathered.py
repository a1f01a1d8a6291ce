"""Gathered findings: the first problems of each rule, the number of all, and files without records."""

from __future__ import annotations

import gzip
from pathlib import Path

from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.check.samples import Write, check_files


def test_of_many_problems_some_are_named_and_all_counted(tokenizer: HuggingFace, write_lines: Write) -> None:
    path = write_lines("a.jsonl", [{"text": 3}] * 30 + [{"text": ""}] * 2)
    answer = check_files(tokenizer, path, num_listed=4)
    assert answer["problem_counts"] == {"type": 30, "empty-text": 2}
    assert [problem["line"] for problem in answer["problems"]] == [1, 2, 3, 4, 31, 32]


def test_an_empty_file_is_not_passed_over(tokenizer: HuggingFace, tmp_path: Path) -> None:
    for name, content in (
        ("a.jsonl", b""),
        ("b.jsonl", b"\n\n"),
        ("c.json", b"[]"),
        ("d.csv", b"text\n"),
        ("e.jsonl.gz", gzip.compress(b"")),
    ):
        (tmp_path / name).write_bytes(content)
    answer = check_files(tokenizer, tmp_path)
    assert answer["problem_counts"] == {"empty-file": 5} and answer["records"] == 0
