"""Settings of a request: columns, or defaults of the section."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train import config
from moe_train.data.records.normal_form import ModelSettings
from tests.data.records.reading import ANSWER, USER, problem, reading

SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
RECORDS = {
    "chat": {"messages": [USER, ANSWER]},
    "completion": {"prompt": "a", "completion": "b"},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "labelled": {"prompt": "a", "completion": "b", "label": True},
}
SECTIONS: dict[str, type[config.ConversationRecord]] = {
    "chat": config.ChatRecord,
    "completion": config.CompletionRecord,
    "preference": config.PreferenceRecord,
    "labelled": config.LabelledRecord,
}


def settings(kind: str, stated: dict[str, Any], **defaults: Any) -> ModelSettings:
    section: Any = SECTIONS[kind](name=kind, **defaults)  # type: ignore[call-arg]
    normal, unread = reading(RECORDS[kind] | stated, section)
    assert unread == ()
    conversation: Any = getattr(normal, "prompt", getattr(normal, "conversation", normal))
    return conversation.settings


@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_states_settings_and_its_section_has_defaults(kind: str) -> None:
    assert settings(kind, {}) == ModelSettings()
    stated = {"reasoning_effort": "high", "response_format": SCHEMA, "chat_template_kwargs": {"enable_thinking": True}}
    assert settings(kind, stated) == ModelSettings(**stated) == settings(kind, {}, **stated)
    assert settings(kind, {"reasoning_effort": "none"}, reasoning_effort="high").reasoning_effort == "none"


def test_variables_of_a_record_are_added_to_those_of_its_section() -> None:
    found = settings("chat", {"chat_template_kwargs": {"a": 1}}, chat_template_kwargs={"a": 2, "b": 3})
    assert found.chat_template_kwargs == {"a": 1, "b": 3}


def test_a_record_may_ask_for_text_where_its_section_asks_for_json() -> None:
    assert settings("chat", {"response_format": {"type": "text"}}, response_format=SCHEMA) == ModelSettings()


@pytest.mark.parametrize("empty", [None, "", {}])
def test_what_says_nothing_is_no_setting(empty: object) -> None:
    stated = dict.fromkeys(("reasoning_effort", "response_format", "chat_template_kwargs"), empty)
    stated["reasoning_effort"] = None if empty == {} else empty
    assert settings("chat", stated) == ModelSettings()


@pytest.mark.parametrize(
    "stated", [{"reasoning_effort": 3}, {"response_format": "json"}, {"response_format": [1]}, {"chat_template_kwargs": "1"}]
)
def test_a_setting_of_another_type_is_a_problem(stated: dict[str, Any]) -> None:
    assert problem(RECORDS["chat"] | stated).rule == "type"
