"""Items of suites: spellings that are read, and what is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_train import config
from moe_train.evaluate.suites.items import ItemsFile, SuiteItem, read_items
from moe_train.evaluate.suites.tool_calls import Call


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
    assert (item.answers, item.category, item.guidance) == (("blue",), "colours", "Be strict.")


@pytest.mark.parametrize("answer", ["blue", "B", "b", "1", 1])
def test_a_choice_by_its_text_letter_or_index(tmp_path: Path, answer: object) -> None:
    (item,) = read(tmp_path, {"question": "Sky?", "choices": ["red", "blue"], "answer": answer})
    assert item.answers == ("blue",)


def test_an_answer_that_could_be_a_text_or_an_index(tmp_path: Path) -> None:
    record = {"question": "1+1?", "choices": ["4", "1", "2"], "answer": "2"}
    assert read(tmp_path, record)[0].answers == ("2",)  # the text and the index of one choice
    with pytest.raises(ValueError, match=r":1: the answer '1' is the text and the index of two choices; state answers_are"):
        read(tmp_path, record | {"choices": ["1", "2"], "answer": "1"})
    file = tmp_path / "items.jsonl"
    assert read_items(ItemsFile(file, answers_are="index"))[0].answers == ("2",)
    assert read_items(ItemsFile(file, answers_are="text"))[0].answers == ("1",)
    with pytest.raises(ValueError, match=r"the answer '1' is none of the 2 choices"):
        read_items(ItemsFile(file, answers_are="letter"))


def test_tools_and_other_containers(tmp_path: Path) -> None:
    tool = {"name": "look_up", "description": "Look a word up.", "parameters": {"type": "object", "properties": {}}}
    (item,) = read(tmp_path, {"question": "Sky?", "answer": "blue", "tools": [tool]})
    assert item.tools[0]["function"]["name"] == "look_up"
    table = tmp_path / "items.csv"
    table.write_text("question,answer\nSky?,blue\n")
    assert read_items(table)[0].answers == ("blue",)


def test_expected_calls(tmp_path: Path) -> None:
    call = {"name": "tide", "arguments": {"port": "Brest"}}
    properties = {"expected_output": [call]}
    spellings = [{"tool_calls": [call]}, {"answer": call}, {"properties": properties}, {"answer": {"tool_calls": [call]}}]
    for item in read(tmp_path, *[{"question": "Tide?", **spelling} for spelling in spellings]):
        assert item.tool_calls == (Call("tide", {"port": "Brest"}),) and item.answers == ()
    assert read(tmp_path, {"question": "Hello", "tool_calls": []})[0].tool_calls == ()


def test_a_text_alone(tmp_path: Path) -> None:
    (item,) = read(tmp_path, {"text": "The harbour is deep."})
    assert (item.messages, item.answers) == ([], ("The harbour is deep.",))


def test_several_files_with_columns_and_categories(tmp_path: Path) -> None:
    for subject in ("deep_sea", "tides"):
        rows = "".join(f"Q{i}?,a,b,{i % 2}\n" for i in range(3))
        (tmp_path / f"{subject}_test.csv").write_text(f"query,first,second,label\n{rows}")
    columns = config.Columns(question="query", answer="label", choices=("first", "second"))
    source = ItemsFile(tmp_path / "*_test.csv", columns, "(.+)_test")
    items = read_items(source, limit=2)
    assert [item.category for item in items] == ["deep sea", "deep sea", "tides", "tides"]
    assert [item.id for item in items][:2] == ["deep_sea_test-1", "deep_sea_test-2"]
    assert items[1].answers == ("b",)
    with pytest.raises(ValueError, match=r"deep_sea_test.csv: its name has no category"):
        read_items(source._replace(category_of_file="(.+)_dev"))
    with pytest.raises(ValueError, match=r"deep_sea_test.csv:\d: there is no column 'text', which columns.question names"):
        read_items(source._replace(columns=config.Columns(question="text")))


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
