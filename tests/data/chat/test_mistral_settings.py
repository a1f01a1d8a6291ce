"""Reasoning and settings with Mistral tokenizers: written where the version has them, one clear line where it has not."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from moe_train import config
from moe_train.data.chat import mistral
from moe_train.data.chat.conversation_to_tokens import examples
from moe_train.data.chat.example import Example
from moe_train.data.records.conversation import read
from moe_train.data.records.normal_form import Conversation, ModelSettings
from moe_train.data.records.problem import Problem
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.chat.chats import CALL, TOOL, spans
from tests.data.chat.test_mistral import both
from tests.data.hugging_face import small_tekken

ASKED = {"role": "user", "content": "2+2?"}
THOUGHT = {"type": "thinking", "thinking": "Two and two."}
SAID = {"type": "text", "text": "4"}
REASONED = {"role": "assistant", "content": "4", "reasoning_content": "Two and two."}
PARTS = {"role": "assistant", "content": [THOUGHT, SAID]}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}


def learned(fields: dict[str, Any], version: str, **section: Any) -> tuple[Example, Mistral]:
    tokenizer, _ = both(version)
    normal = read(fields, config.ChatRecord(name="chat", **section)).record
    assert isinstance(normal, Conversation)
    (example,) = examples(normal, None, tokenizer)
    return example, tokenizer


def refused(fields: dict[str, Any], version: str, **section: Any) -> Problem:
    with pytest.raises(Problem) as caught:
        learned(fields, version, **section)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("answer", [REASONED, PARTS])
@pytest.mark.parametrize(("version", "effort"), [("small-v13", {}), ("small-v15", {"reasoning_effort": "high"})])
def test_reasoning_is_trained_on_like_the_answer(version: str, effort: dict[str, str], answer: dict[str, Any]) -> None:
    example, tokenizer = learned({"messages": [ASKED, answer, ASKED, answer], **effort}, version)
    assert spans(example, tokenizer, True) == ["[THINK]Two and two.[/THINK]4</s>"] * 2
    assert "[MODEL_SETTINGS]" not in "".join(spans(example, tokenizer, True))


def test_reasoning_before_a_call() -> None:
    calling = {"role": "assistant", "reasoning": "Look.", "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "abcdefghi", "content": "1"}
    example, tokenizer = learned({"messages": [ASKED, calling, result, PARTS], "tools": [TOOL]}, "small-v13")
    first, last = spans(example, tokenizer, True)
    assert first == "[THINK]Look.[/THINK][TOOL_CALLS]f[ARGS]{}</s>" and last == "[THINK]Two and two.[/THINK]4</s>"


def test_reasoning_that_is_cut_off_and_reasoning_of_a_system_prompt() -> None:
    system = {"role": "system", "content": [{"type": "text", "text": "Think:"}, THOUGHT | {"closed": False}]}
    example, tokenizer = learned({"messages": [system, ASKED, PARTS]}, "small-v13")
    begin = "<s>[SYSTEM_PROMPT]Think:[THINK]Two and two.[/SYSTEM_PROMPT]"
    assert tokenizer.decode(example.tokens, keep_special=True).startswith(begin)
    record = {"messages": [system, ASKED, PARTS], "reasoning_effort": "high"}
    assert "a system prompt with reasoning" in refused(record, "small-v15").message


@pytest.mark.parametrize("version", ["v1", "v3", "v7", "small-v11"])
def test_reasoning_is_refused_where_no_token_is_for_it_and_may_be_ignored(version: str) -> None:
    for answer, name in ((REASONED, "messages.reasoning_content"), (PARTS, "content.thinking")):
        record = {"messages": [ASKED, answer]}
        problem = refused(record, version)
        assert problem.rule == "thinking" and f"version {version.removeprefix('small-')}" in problem.message
        assert name.removeprefix("messages.") in problem.remedy and "v13 or v15" in problem.remedy
        example, tokenizer = learned(record, version, ignore=(name,))
        assert "4" in spans(example, tokenizer, True)[0] and "Two" not in tokenizer.decode(example.tokens)


def test_settings_of_a_record_or_of_its_section_stand_before_the_question() -> None:
    stated = {"reasoning_effort": "high", "response_format": SCHEMA}
    record = {"messages": [{"role": "system", "content": "Hi."}, ASKED, PARTS, ASKED, PARTS]}
    example, tokenizer = learned(record | stated, "small-v15")
    settings = '[MODEL_SETTINGS]{"json_schema": {"type": "object"}, "reasoning_effort": "high"}[/MODEL_SETTINGS]'
    question, between = spans(example, tokenizer, False)
    assert question == f"<s>[SYSTEM_PROMPT]Hi.[/SYSTEM_PROMPT]{settings}[INST]2+2?[/INST]" and between == "[INST]2+2?[/INST]"
    assert learned(record, "small-v15", **stated)[0] == example
    prompt = mistral.prompt(Conversation(record["messages"][:2], [], ModelSettings("high", SCHEMA)), tokenizer).tokens
    assert tokenizer.decode(prompt, keep_special=True) == question


@pytest.mark.parametrize("stated", [{}, {"reasoning_effort": "none"}])
def test_reasoning_with_an_effort_of_none_is_a_problem(stated: dict[str, str]) -> None:
    record = {"messages": [ASKED, PARTS], **stated}
    problem = refused(record, "small-v15")
    assert problem.rule == "effort" and "asks for none" in problem.message and ("by default" in problem.message) == (not stated)
    assert "reasoning_effort of record" in problem.remedy
    ignored, _ = learned(record, "small-v15", ignore=("reasoning_effort",), reasoning_effort="high")
    assert ignored == learned(record | {"reasoning_effort": "high"}, "small-v15")[0]
    # An untrained turn may have been made with another effort.
    learned({"messages": [ASKED, PARTS | {"weight": 0}, ASKED, {"role": "assistant", "content": "4"}], **stated}, "small-v15")


@pytest.mark.parametrize("version", ["v1", "v3", "v7", "small-v11", "small-v13"])
@pytest.mark.parametrize(("key", "value"), [("reasoning_effort", "none"), ("response_format", {"type": "json_object"})])
def test_settings_are_refused_before_v15_and_may_be_ignored(version: str, key: str, value: object) -> None:
    record = {"messages": [ASKED, {"role": "assistant", "content": "4"}], key: value}
    problem = refused(record, version)
    assert problem.rule == "settings" and key in problem.message and f"--ignore {key}" in problem.remedy
    assert learned(record, version, ignore=(key,)) == learned({"messages": record["messages"]}, version)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"reasoning_effort": "low"}, "reasoning_effort is 'low', and tekken.json (version v15) has none, high"),
        ({"reasoning_effort": "a lot"}, "has none, high"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "its format is fixed"),
    ],
)
def test_settings_that_a_tokenizer_does_not_have(stated: dict[str, Any], said: str) -> None:
    assert said in refused({"messages": [ASKED, PARTS], **stated}, "small-v15").message


@pytest.mark.parametrize("schema", [{"type": "json_schema"}, {"type": "yaml"}])
def test_a_response_format_that_mistral_common_does_not_know_is_one_line(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"response_format(\.type)? of the record is not accepted: .*; correct ") as caught:
        learned({"messages": [ASKED, PARTS], "reasoning_effort": "high", "response_format": schema}, "small-v15")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("builder", "stated", "said"),
    [
        ({}, {"reasoning_effort": "high"}, r"the model_settings_builder of tekken.json \(version v15\) has none"),
        ({}, {"response_format": SCHEMA}, "has no json_schema"),
        (None, {}, "has no model_settings_builder"),
    ],
)
def test_a_tekken_with_an_incomplete_builder(builder: dict[str, Any] | None, stated: dict[str, Any], said: str) -> None:
    """mistral-common leaves a setting without a builder out in silence."""
    file = small_tekken(Path(tempfile.mkdtemp()), "v15", builder={})
    if builder is None:
        file.write_text(file.read_text().replace('"model_settings_builder": {}', '"another": {}'))
    messages = [ASKED, {"role": "assistant", "content": "4"}]
    normal = read({"messages": messages, **stated}, config.ChatRecord(name="chat")).record
    assert isinstance(normal, Conversation)
    with pytest.raises(Problem, match=said):
        examples(normal, None, Mistral(file))
