"""Records of several kinds in one source, which training does not take."""

from __future__ import annotations

import pytest

from moe_train import config
from moe_train.data.check.kinds import kind_of
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.check.samples import CHAT, Write, check_files

TEXT = {"text": "Plain words."}
TURNS = {"prompt": "a", "completion": "b"}


def test_each_further_kind_is_one_problem(tokenizer: HuggingFace, write_lines: Write) -> None:
    path = write_lines("a.jsonl", [CHAT, TEXT, CHAT, TEXT, TURNS, {"text": ""}])
    answer = check_files(tokenizer, path)
    mixed = [(problem["where"], problem["rule"]) for problem in answer["problems"] if problem["rule"] == "mixed-kinds"]
    assert mixed == [(f"{path}:2", "mixed-kinds"), (f"{path}:5", "mixed-kinds")]
    assert answer["records_with_problems"] == 4 and answer["problem_counts"]["mixed-kinds"] == 2
    texts, turns = (problem["message"] for problem in answer["problems"] if problem["rule"] == "mixed-kinds")
    assert texts.startswith("3 records have a text in column text; the first kind of the source has messages, as in ")
    assert turns.startswith("1 record has a completion in columns prompt and completion; ") and turns.endswith("a.jsonl:1")


@pytest.mark.parametrize("records", [[CHAT, {"conversations": CHAT["messages"]}, {"interactions": CHAT["messages"]}], [TEXT, TEXT]])
def test_one_kind_in_several_columns_is_one_kind(tokenizer: HuggingFace, write_lines: Write, records: list[dict[str, str]]) -> None:
    assert check_files(tokenizer, write_lines("a.jsonl", records))["problem_counts"] == {}


def test_a_stated_section_reads_one_kind(tokenizer: HuggingFace, write_lines: Write) -> None:
    path = write_lines("a.jsonl", [CHAT, TEXT])
    assert check_files(tokenizer, path, record=config.ChatRecord(name="chat"))["problem_counts"] == {"mixed-kinds": 1}


def test_every_kind_has_a_description() -> None:
    sections = [
        config.TextRecord(name="text"),
        config.TextRecord(name="text", column="content"),
        config.ChatRecord(name="chat"),
        config.CompletionRecord(name="completion"),
        config.PreferenceRecord(name="preference"),
        config.LabelledRecord(name="labelled"),
    ]
    assert len({kind_of(section) for section in sections}) == len(sections)
