"""Several processes: they find the same as one, and the death of one is explained."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moe_train.data.check import processes
from moe_train.data.check.findings import Chunk, Findings
from moe_train.data.check.sources import CheckedSource
from moe_train.data.records import json_array, json_lines
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.check.samples import Write, check_files, varied


def test_any_number_of_processes_finds_the_same(
    tokenizer: HuggingFace, write_lines: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_WORTH_PROCESSES", 0)
    monkeypatch.setattr(json_lines, "BLOCK", 5000)
    monkeypatch.setattr(json_array, "BLOCK", 5000)
    paths = [write_lines("a.jsonl", varied(300)), write_lines("eval.jsonl", varied(4))]
    (tmp_path / "b.json").write_text(json.dumps(varied(300)[::-1]))
    settings = {"seq_len": 64, "batch_size": 2, "against": (CheckedSource((str(paths[1]),)),), "num_listed": 5}
    answers = []
    copies = []
    for num_proc in (1, 2, 3):
        out = tmp_path / f"fixed-{num_proc}"
        answer = check_files(tokenizer, paths[0], tmp_path / "b.json", num_proc=num_proc, fix=out, **settings)
        assert answer.pop("fixed")["directory"] == str(out)
        answers.append(answer)
        copies.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert answers[0] == answers[1] == answers[2] and answers[0]["records"] == 600
    assert answers[0]["duplicates"]["exact"] > 20 and answers[0]["overlap"]["records"] > 5
    assert copies[0] == copies[1] == copies[2]


def test_processes_are_started_where_they_pay() -> None:
    assert processes.useful_processes(4, 1 << 20, sampling=False) == 1
    assert processes.useful_processes(4, 1 << 30, sampling=False) == 4
    assert processes.useful_processes(4, 1 << 20, sampling=True) == 4


def die(chunk: Chunk) -> Findings:
    """Take the place of `_examine_in_worker` in a worker that is killed."""
    os._exit(9)


def test_a_process_that_died_is_explained(tokenizer: HuggingFace, write_lines: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_WORTH_PROCESSES", 0)
    monkeypatch.setattr(processes, "_examine_in_worker", die)
    with pytest.raises(RuntimeError, match="died, for want of memory perhaps; use --num-proc 1"):
        check_files(tokenizer, write_lines("a.jsonl", varied(10)), num_proc=2)
