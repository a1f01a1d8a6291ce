"""Settings of a request: columns of a record, or defaults of the section that it is read with."""

from __future__ import annotations

from typing import Any

from moe_train import config
from moe_train.data.records.normal_form import ModelSettings
from moe_train.data.records.problem import Problem, brief
from moe_train.data.records.tools import json_value
from moe_train.data.records.unread import is_empty

SETTINGS = ModelSettings._fields
"""Columns of a record that hold settings."""


def default_settings(record: config.ConversationRecord) -> ModelSettings:
    """Return the settings of records that do not state any."""
    return ModelSettings(record.reasoning_effort, _format(record.response_format), record.chat_template_kwargs or None)


def take_settings(remaining: dict[str, Any], record: config.ConversationRecord) -> ModelSettings:
    """Take the settings of a request out of a record; what it does not state is taken from its section.

    Raises:
        Problem: If a setting is of another type.
    """
    default = default_settings(record)
    effort = remaining.pop("reasoning_effort", None)
    if effort is not None and not isinstance(effort, str):
        raise Problem("type", f"reasoning_effort should be text, not {brief(effort)}", 'write "none" or "high"')
    variables = _take_object(remaining, "chat_template_kwargs", "write an object")
    if default.chat_template_kwargs:
        # The record's variables override those of its section one by one.
        variables = {**default.chat_template_kwargs, **(variables or {})}
    stated_format = _take_object(remaining, "response_format", "write it as OpenAI does")
    response_format = default.response_format if stated_format is None else _format(stated_format)
    return ModelSettings(effort or default.reasoning_effort, response_format, variables or None)


def _take_object(remaining: dict[str, Any], column: str, remedy: str) -> dict[str, Any] | None:
    """Take an object, or its JSON text, out of a record; None if there is none."""
    value = remaining.pop(column, None)
    if is_empty(value):
        return None
    value = json_value(value, column, remedy)
    if not isinstance(value, dict):
        raise Problem("type", f"{column} should be an object, not {brief(value)}", remedy)
    return value


def _format(response_format: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the format of an answer; None for text, which is what an answer is if nothing is stated."""
    if not response_format or response_format == {"type": "text"}:
        return None
    return response_format
