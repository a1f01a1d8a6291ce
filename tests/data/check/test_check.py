"""The check of data: what it finds and where."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest

from moe_train.data.check.check import check_data
from moe_train.data.check.settings import RULE_NAMES, CheckSettings
from moe_train.data.check.sources import CheckedSource
from moe_train.data.records import json_lines
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.check.samples import ANSWER, KINDS, LINES, USER, Write, check_files, varied


def test_a_clean_file(tokenizer: HuggingFace, write_lines: Write) -> None:
    path = write_lines("a.jsonl", [*KINDS, {"messages": [USER, ANSWER, USER, ANSWER]}])
    answer = check_files(tokenizer, path, allowed=frozenset({"mixed-kinds"}))
    assert answer["problems"] == [] and answer["records"] == 5 and answer["records_with_problems"] == 0
    assert answer["shapes"] == {"chat": 2, "completion": 2, "text": 1}
    assert answer["examples"] == 5 and answer["truncation"] is None and answer["packing"] is None and answer["overlap"] is None


def test_every_problem_has_its_file_line_rule_and_remedy(tokenizer: HuggingFace, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in LINES))
    answer = check_files(tokenizer, path, seq_len=128, allowed=frozenset({"mixed-kinds"}))
    expected = [(f"{path}:{i}", rule) for i, (_, rule) in enumerate(LINES, start=1) if rule]
    assert [(problem["where"], problem["rule"]) for problem in answer["problems"]] == expected
    assert all(problem["file"] == str(path) and problem["remedy"] and problem["message"] for problem in answer["problems"])
    assert [problem["line"] for problem in answer["problems"]] == [i for i, (_, rule) in enumerate(LINES, start=1) if rule]
    assert answer["records"] == len([line for line, _ in LINES if line])
    assert answer["records_with_problems"] == len(expected)
    assert answer["problem_counts"] == collections.Counter(rule for _, rule in expected)
    assert set(answer["problem_counts"]) <= RULE_NAMES


def test_progress_ends_with_everything(tokenizer: HuggingFace, write_lines: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "BLOCK", 2000)
    path = write_lines("a.jsonl", varied(100))
    reports: list[tuple[int, int, int]] = []
    settings = CheckSettings(template=tokenizer.chat_template)
    check_data([CheckedSource((str(path),))], tokenizer, settings, lambda *report: reports.append(report))
    assert reports == sorted(reports) and len(reports) > 5
    assert reports[-1] == (path.stat().st_size, path.stat().st_size, 100)
