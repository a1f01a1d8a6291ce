"""JSON files that are not one record a line: arrays, wrapped arrays, objects over several lines."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from moe_train.data.records import json_array
from moe_train.data.records.json_document import is_lines, read_document
from tests.data.records.sources import ROWS, opened, texts

pytestmark = pytest.mark.usefixtures("no_network")
PRETTY = json.dumps({"messages": [{"role": "user", "content": "a"}]}, indent=2)


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "a"}\n{"text": "b"}\n',
        '{"text": "a"}',
        '{"text": "a",\n{"text": "b"}\n',  # a damaged line
        '{"text": "a\n{"text": "b"}\n',
        '{"text": "a"\n',
        '{"id": 1, "data": ["a", "b"]}',
        '{"data": [{"role": "user", "content": "a"}]}\n',  # messages under a key of one's own
        '{"messages": [{"role": "user"}]}',
        '{"text": "{\\"data\\": [{"}',
        "",
        "text",
        '{"a": 1]\n"b"',
    ],
)
def test_one_record_a_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    assert is_lines(tmp_path / "a.json")


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        "\n " + json.dumps(ROWS, indent=1),
        *(json.dumps({"data": ROWS}, indent=indent) for indent in (None, 1)),
        json.dumps({"version": "1.1 [{", "count": 3, "train": ROWS}),
        json.dumps({"data": ROWS, "license": "mit", "version": 1.0}, indent=4),
        "\n".join(json.dumps(row, indent=2) for row in ROWS),
        "".join(json.dumps(row, indent="\t") for row in ROWS),
        '{ "text": "one"\n, "id": 1 }\n' + json.dumps(ROWS[1]) + json.dumps(ROWS[2]),
        '{"text":\n"one"}\n' + json.dumps({"data": ROWS[1:]}),
        "\ufeff" + json.dumps({"records": ROWS}, indent=0),
    ],
)
@pytest.mark.parametrize("size", [7, 1 << 20])
def test_a_document_gives_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, size: int) -> None:
    monkeypatch.setattr(json_array, "BLOCK", size)
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    assert not is_lines(path) and texts(opened(path)) == [row["text"] for row in ROWS]


def test_a_pretty_record_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(PRETTY)
    assert list(read_document(tmp_path / "a.jsonl")) == [(1, json.loads(PRETTY))]


@pytest.mark.parametrize(
    ("content", "count", "fault"),
    [
        ('{"train": [{"text": "a"}], "test": [{"text": "b"}]}', 2, "the records 'train' and beside them 'test'.*a file for each"),
        ('{"system": "s", "data": [{"text": "a"}]}', 1, "beside them 'system', which is not read"),
        ('{"version": 1x, "data": [{"text": "a"}]}', 1, "not JSON: .* of the object on line 1"),
        ('{"version": 1, "version": 2, "data": []}', 1, "'version' stands twice"),
        ('{"data": [{"text": "a"}], "version": [1]}', 2, "beside them 'version'"),
        ('{"data": [{"text": "a"}] "version": 1}', 2, "no , before"),
        ('{"data": [{"text": "a"}]', 2, "without a closing bracket; is it cut short"),
        ('{"data": [{"text": "a"}, 3]}', 2, "not a number"),
        ('[{"text": "a"}] []', 2, "something follows the array on line 1; nothing after it is read"),
        (PRETTY[:-3], 1, "not JSON: .* on line"),
        (PRETTY + "\n" + PRETTY[:20], 2, "not JSON"),
        ('{\n"text": "a", "text": "b"}', 1, "stands twice"),
    ],
)
def test_what_is_malformed_or_unread_is_one_problem(tmp_path: Path, content: str, count: int, fault: str) -> None:
    (tmp_path / "a.json").write_text(content)
    *good, (number, problem) = read_document(tmp_path / "a.json")
    assert number == count == len(good) + 1 and isinstance(problem, ValueError)
    assert "\n" not in str(problem)
    with pytest.raises(ValueError, match=rf"a\.json: row {count}: .*{fault}"):
        list(opened(tmp_path / "a.json"))


@pytest.mark.parametrize("part", ['"', "\\", '{"a": [', "a", "\n", '": "', '\\"', "[{", '", "data": [{'])
def test_the_form_of_a_file_is_told_in_linear_time(tmp_path: Path, part: str) -> None:
    for content in (part * 100_000, json.dumps({"text": part * 100_000}), '{"a": 1, ' * 10_000 + part * 10_000):
        (tmp_path / "a.jsonl").write_text(content)
        start = time.process_time()
        is_lines(tmp_path / "a.jsonl")
        assert time.process_time() - start < 1
