"""The check of data: what it finds and where, in any number of processes, and which sources it can check."""

from __future__ import annotations

import collections
import gzip
import json
from pathlib import Path

import pytest

from moe_train import config
from moe_train.data.check import check as checks
from moe_train.data.check.check import CheckedSource, Settings, check_records, sources_of
from moe_train.data.records import json_array, json_lines
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
    assert set(answer["problem_counts"]) <= checks.RULE_NAMES


def test_a_rule_may_be_broken_where_that_is_allowed(tokenizer: HuggingFace, write_lines: Write) -> None:
    path = write_lines("a.jsonl", [{"text": "x </s> y"}, {"text": 3}])
    assert check_files(tokenizer, path, allowed=frozenset({"control-token"}))["problem_counts"] == {"type": 1}
    with pytest.raises(ValueError, match=r"there is no rule control; the rules are .*control-token"):
        check_files(tokenizer, path, allowed=frozenset({"control"}))


def test_of_many_problems_some_are_named_and_all_counted(tokenizer: HuggingFace, write_lines: Write) -> None:
    path = write_lines("a.jsonl", [{"text": 3}] * 30 + [{"text": ""}] * 2)
    answer = check_files(tokenizer, path, shown=4)
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


def test_columns_by_a_mapping(tokenizer: HuggingFace, write_lines: Write) -> None:
    path = write_lines("a.jsonl", [{"ask": "2 + 3?", "say": "5"}])
    assert check_files(tokenizer, path)["problem_counts"] == {"columns": 1}
    assert check_files(tokenizer, path, record=checks.section_of(["prompt=ask", "completion=say"]))["problems"] == []
    assert checks.section_of(["messages=x"]) == config.ChatRecord(name="chat", column="x")
    assert checks.section_of(["text=x"]) == config.TextRecord(name="text", column="x")
    assert checks.section_of([]) is None
    for wrong in (["prompt=a"], ["text=a", "messages=b"], ["text"], ["body=a"]):
        with pytest.raises(ValueError, match=r"--map .* should be"):
            checks.section_of(wrong)


def test_any_number_of_processes_finds_the_same(
    tokenizer: HuggingFace, write_lines: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_WORTH_PROCESSES", 0)
    monkeypatch.setattr(json_lines, "BLOCK", 5000)
    monkeypatch.setattr(json_array, "BLOCK", 5000)
    paths = [write_lines("a.jsonl", varied(300)), write_lines("eval.jsonl", varied(4))]
    (tmp_path / "b.json").write_text(json.dumps(varied(300)[::-1]))
    settings = {"seq_len": 64, "batch_size": 2, "against": (CheckedSource((str(paths[1]),)),), "shown": 5}
    answers, copies = [], []
    for num_proc in (1, 2, 3):
        out = tmp_path / f"fixed-{num_proc}"
        answer = check_files(tokenizer, paths[0], tmp_path / "b.json", num_proc=num_proc, fix=out, **settings)
        assert answer.pop("fixed")["directory"] == str(out)
        answers.append(answer)
        copies.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert answers[0] == answers[1] == answers[2] and answers[0]["records"] == 600
    assert answers[0]["duplicates"]["exact"] > 20 and answers[0]["overlap"]["records"] > 5
    assert copies[0] == copies[1] == copies[2]


def test_progress_ends_with_everything(tokenizer: HuggingFace, write_lines: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "BLOCK", 2000)
    path = write_lines("a.jsonl", varied(100))
    told: list[tuple[int, int, int]] = []
    check_records(
        [CheckedSource((str(path),))], tokenizer, Settings(template=tokenizer.chat_template), lambda *done: told.append(done)
    )
    assert told == sorted(told) and len(told) > 5
    assert told[-1] == (path.stat().st_size, path.stat().st_size, 100)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (config.PreparedSource(name="prepared", path="s3://sets/a"), "s3://sets/a is a prepared source.*manifest.json names"),
        (
            config.HubSource(name="hub", dataset="o/d", revision="0" * 40, record=config.TextRecord(name="text")),
            "o/d is a hub source, and not files of records.*its download",
        ),
    ],
)
def test_what_is_not_in_files_is_refused(source: config.Source, said: str) -> None:
    with pytest.raises(ValueError, match=f"^data: {said}"):
        sources_of([source])
