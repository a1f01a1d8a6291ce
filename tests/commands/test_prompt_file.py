"""Prompts and tools from files; every error names its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.commands.prompt_file import read_prompt_file, read_tools_file

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def test_conversations_and_texts_are_read(tmp_path: Path) -> None:
    records = [{"id": "q", "messages": [{"role": "user", "content": "a"}], "tools": [TOOL]}, {"prompt": "b", "tools": None}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    first, second = read_prompt_file(file)
    assert (first.id, first.messages, first.tools, first.text) == ("q", records[0]["messages"], [TOOL], None)
    assert (second.location, second.text, second.tools) == (f"{file}:2", "b", [])
    (tmp_path / "tools.json").write_text(json.dumps([TOOL]))
    assert read_tools_file(tmp_path / "tools.json") == (TOOL,)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: "),
        ('{"prompt": 3}', ":2: prompt should be text, not 3; write it as a string"),
        ('{"question": "a"}', ":2: the record has neither messages nor prompt nor audio; write one of them"),
        ('{"prompt": "a", "messages": []}', ":2: the record has messages and prompt; keep one of them"),
        ('{"prompt": "a", "system": "b"}', ":2: key 'system' is not read; remove it"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', ":2: the last message is an assistant's"),
        ('{"prompt": "a", "tools": "f"}', ":2: "),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"prompts\.jsonl") as error:
        read_prompt_file(file)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_empty_files_and_wrong_tools_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty"):
        read_prompt_file(tmp_path / "empty.jsonl")
    tools = tmp_path / "tools.json"
    for text, message in (("{", "not JSON"), ("{}", "should be a list"), ("[3]", "tool 0")):
        tools.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_tools_file(tools)
