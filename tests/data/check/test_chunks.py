"""What is read of files: every format, or a sample whose coverage is stated."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.check.samples import CHAT, Write, check_files


def test_every_format_is_found_in_a_folder(tokenizer: HuggingFace, tmp_path: Path, write_lines: Write) -> None:
    lines = write_lines("a.jsonl", [CHAT]).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.json").write_text(json.dumps([CHAT, CHAT]))
    (tmp_path / "d.csv").write_text("question,answer\n2 + 3?,5\n")
    (tmp_path / "e.txt").write_text("Once.\n")
    pyarrow.parquet.write_table(pa.Table.from_pylist([CHAT, {"messages": []}]), tmp_path / "f.parquet")
    answer = check_files(tokenizer, tmp_path, allowed=frozenset({"mixed-kinds"}))
    assert answer["files"] == 6 and answer["records"] == 8
    assert answer["shapes"] == {"chat": 5, "completion": 1, "text": 1}
    assert [problem["where"] for problem in answer["problems"]] == [f"{tmp_path / 'f.parquet'}: row 2"]


def test_a_sample_states_its_coverage(tokenizer: HuggingFace, write_lines: Write, tmp_path: Path) -> None:
    path = write_lines("a.jsonl", [{"text": f"record {n} " + "x" * (n % 13)} for n in range(2000)])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(path.read_bytes(), 0))
    everything = check_files(tokenizer, path, sample=10**6)
    assert everything["sample"]["records"] <= 2000 and everything["sample"]["of_about"] == pytest.approx(2000, rel=0.02)
    answer = check_files(tokenizer, path, sample=200)
    assert answer["sample"]["records"] == answer["records"] == pytest.approx(200, abs=5)
    assert answer["sample"]["of_about"] == pytest.approx(2000, rel=0.1) and answer["sample"]["share"] == pytest.approx(0.1, rel=0.1)
    assert answer["duplicates"] is None
    assert check_files(tokenizer, path, sample=200) == answer
    both = check_files(tokenizer, path, tmp_path / "b.jsonl.gz", sample=200)["sample"]
    assert both["only_begun"] == [str(tmp_path / "b.jsonl.gz")] and both["of_about"] is None
    with pytest.raises(ValueError, match="a sample cannot be fixed"):
        check_files(tokenizer, path, sample=5, fix=tmp_path / "out")


def test_a_problem_in_a_sample_names_its_byte(tokenizer: HuggingFace, write_lines: Write) -> None:
    path = write_lines("a.jsonl", [{"text": n} for n in range(50)])
    answer = check_files(tokenizer, path, sample=10)
    for problem in answer["problems"]:
        start = int(re.fullmatch(rf"{re.escape(str(path))}: byte (\d+)", problem["where"])[1])
        line = path.read_bytes()[start - 1 :].split(b"\n")[0]
        assert json.loads(line)["text"] == int(re.search(r"not (\d+)", problem["message"])[1])
