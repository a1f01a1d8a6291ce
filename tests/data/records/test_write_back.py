"""An edited record is written into its own columns, so that its section still reads it, or not at all."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train import config
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.recognise import recognise
from moe_train.data.records.write_back import denormalise
from tests.data.records.reading import ANSWER, CALLING, RESULT, TOOL, USER, reading

SHAREGPT = [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": "4\0"}]
EDITED = [USER, ANSWER]


@pytest.mark.parametrize(
    ("fields", "record"),
    [
        ({"messages": [USER, ANSWER | {"content": "4\0"}], "id": 1}, None),
        ({"conversations": SHAREGPT}, config.ChatRecord(name="chat", column="conversations")),
        ({"talk": [{"who": "user", "says": "a"}, {"who": "me", "says": "b"}]},
         config.ChatRecord(name="chat", column="talk", role="who", content="says", roles={"me": "assistant"})),
        ({"question": "a", "answer": "b", "id": 1}, None),
        ({"prompt": [USER], "completion": [ANSWER]}, None),
        ({"prompt": [USER], "completion": "b"}, None),
    ],
)  # fmt: skip
def test_the_section_reads_what_was_written(fields: dict[str, Any], record: config.Record | None) -> None:
    section = record or recognise(fields)
    written = denormalise(fields, Conversation(EDITED, []), section)
    assert written is not None and reading(written, section).record == Conversation(EDITED, [])
    assert written.get("id") == fields.get("id") and set(fields) - set(written) == set()


def test_what_its_columns_cannot_say_is_not_written() -> None:
    section = config.CompletionRecord(name="completion")
    fields = {"prompt": "a", "completion": "b", "context": "c"}
    assert denormalise(fields, Conversation(EDITED, []), section) is None  # prompt and context cannot be told apart
    longer = Conversation([USER, ANSWER, USER, ANSWER], [])
    assert denormalise({"prompt": "a", "completion": "b"}, longer, section) is None
    assert denormalise({"prompt": "a", "chosen": "b", "rejected": "c"}, longer, config.PreferenceRecord(name="preference")) is None


def test_texts_and_tools() -> None:
    assert denormalise({"body": "a\0", "id": 1}, "a", config.TextRecord(name="text", column="body")) == {"body": "a", "id": 1}
    fields = {"interactions": [USER, CALLING, RESULT, ANSWER], "available_tools": [TOOL], "system": "S"}
    normal = reading(fields).record
    assert isinstance(normal, Conversation)
    assert denormalise(fields, normal, config.ChatRecord(name="chat")) == {"messages": normal.messages, "tools": [TOOL]}


@pytest.mark.parametrize("column", ["messages", "completion"])
def test_pieces_of_a_message(column: str) -> None:
    guess: dict[str, Any] = {"type": "text", "text": "Perhaps 5. ", "train": False}
    answer = {"role": "assistant", "content": [guess, {"type": "text", "text": "4"}]}
    fields = {"messages": [USER, answer]} if column == "messages" else {"prompt": [USER, answer, USER], "completion": [answer]}
    section = recognise(fields)
    normal = reading(fields, section).record
    assert isinstance(normal, Conversation) and normal.messages[-1]["pieces"] == [[("Perhaps 5. ", False), ("4", True)]]
    written = denormalise(fields, normal, section)
    assert written is not None and reading(written, section).record == normal
