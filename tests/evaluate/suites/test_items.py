"""Items of suites: spellings that are read, and what is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_train.evaluate.suites.items import SuiteItem, read_items


def read(tmp_path: Path, *records: dict[str, Any], limit: int | None = None) -> list[SuiteItem]:
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_items(file, limit)


def test_question_and_answer(tmp_path: Path) -> None:
    first, second = read(tmp_path, {"question": "2+2?", "answer": 4}, {"id": "b", "prompt": "Sky?", "answer": ["blue", "grey"]})
    assert first.messages == [{"role": "user", "content": "2+2?"}]
    assert (first.id, first.answers) == ("1", ("4",))
    assert (second.id, second.answers) == ("b", ("blue", "grey"))


def test_mistral_studio(tmp_path: Path) -> None:
    properties = {"expected_output": "blue", "category": "colours", "grading_guidance": "Be strict."}
    (item,) = read(tmp_path, {"messages": [{"role": "user", "content": "Sky?"}], "properties": properties})
    assert (item.answers, item.category) == (("blue",), "colours")


@pytest.mark.parametrize("answer", ["blue", "B", "b", "1", 1])
def test_a_choice_by_its_text_letter_or_index(tmp_path: Path, answer: object) -> None:
    (item,) = read(tmp_path, {"question": "Sky?", "choices": ["red", "blue"], "answer": answer})
    assert item.answers == ("blue",)


def test_choices_that_look_like_an_index_are_texts(tmp_path: Path) -> None:
    (item,) = read(tmp_path, {"question": "1+1?", "choices": ["1", "2"], "answer": "1"})
    assert item.answers == ("1",)


def test_tools_and_other_containers(tmp_path: Path) -> None:
    tool = {"name": "look_up", "description": "Look a word up.", "parameters": {"type": "object", "properties": {}}}
    (item,) = read(tmp_path, {"question": "Sky?", "answer": "blue", "tools": [tool]})
    assert item.tools[0]["function"]["name"] == "look_up"
    table = tmp_path / "items.csv"
    table.write_text("question,answer\nSky?,blue\n")
    assert read_items(table)[0].answers == ("blue",)


def test_limit(tmp_path: Path) -> None:
    assert len(read(tmp_path, *[{"question": str(i), "answer": "a"} for i in range(5)], limit=3)) == 3


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": "a"}, "the item has no question"),
        ({"question": "a", "prompt": "b"}, "the item has question and prompt"),
        ({"question": "a", "answer": "b", "expected_output": "c"}, "keep one of them"),
        ({"question": "a", "label": 1}, "key 'label' is not read"),
        ({"question": "a", "answer": "E", "choices": ["x", "y"]}, "none of the 2 choices"),
        ({"question": "a", "choices": "x"}, "choices should be a list"),
        ({"question": 3}, "question should be text"),
        ({"question": "a", "schema": "x"}, "schema should be an object"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "the last message is an assistant's",
        ),
        ({"question": "a", "properties": {"question": "b"}}, "stands in the item and in its properties"),
    ],
)
def test_what_is_refused(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"items.jsonl:2: ") as error:
        read(tmp_path, {"question": "fine", "answer": "b"}, record)
    assert message in str(error.value)


def test_two_items_of_one_id(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"items.jsonl:2: id 'x' is also that of .*items.jsonl:1"):
        read(tmp_path, {"id": "x", "question": "a"}, {"id": "x", "question": "b"})


def test_no_items_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no items"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file of items"):
        read_items(tmp_path / "none.jsonl")
