"""Records that several tests read, and shorthands for reading them."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train import config
from moe_train.data.records.conversation import Reading, read
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem
from moe_train.data.records.recognise import recognise

USER = {"role": "user", "content": "How high is the tide?"}
ANSWER = {"role": "assistant", "content": "4.2 m."}
SCHEMA = {"type": "object", "properties": {"port": {"type": "string"}}, "required": ["port"]}
FUNCTION = {"name": "get_tide", "description": "Tide at a port.", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "call00000", "type": "function", "function": {"name": "get_tide", "arguments": '{"port": "Brest"}'}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4.2", "tool_call_id": "call00000"}


def reading(fields: dict[str, Any], record: config.Record | None = None, ignore: tuple[str, ...] = ()) -> Reading:
    return read(fields, record or recognise(fields, ignore))


def conversation(fields: dict[str, Any]) -> Conversation:
    """The conversation of a record of which every key is read."""
    normal, unread = reading(fields)
    assert isinstance(normal, Conversation) and unread == ()
    return normal


def problem(fields: dict[str, Any], record: config.Record | None = None) -> Problem:
    with pytest.raises(Problem) as caught:
        reading(fields, record)
    assert caught.value.message and caught.value.remedy
    return caught.value
