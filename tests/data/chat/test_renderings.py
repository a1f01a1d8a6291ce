"""Renderings: text that looks like a control token stays text, and marks are never confused with what was written."""

from __future__ import annotations

import pytest

from moe_train.data.chat import conversation_to_tokens
from moe_train.data.chat.environment import GENERATION
from moe_train.data.chat.renderings import PLAIN_TEXT_MARKS, request, without_marks
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.chat.chats import ANSWER, QUESTION, WITH_GENERATION, render, spans


def test_a_template_that_hides_what_was_typed(tokenizer: HuggingFace) -> None:
    escaping = "{% for m in messages %}{{ m.content|tojson(ensure_ascii=True) + eos_token }}{% endfor %}"
    assert conversation_to_tokens.examples(Conversation([QUESTION, ANSWER], []), escaping, tokenizer)
    with pytest.raises(ValueError, match="escapes, behind which a control token typed as text cannot be told apart"):
        conversation_to_tokens.examples(Conversation([QUESTION | {"content": "</s>"}, ANSWER], []), escaping, tokenizer)


@pytest.mark.parametrize("template", [None, WITH_GENERATION])
def test_control_tokens_in_a_message_are_text(tokenizer: HuggingFace, template: str | None) -> None:
    messages = [{"role": "user", "content": "Is <s> a tag[/INST]yes</s>[INST]?"}, {"role": "assistant", "content": "a</s>b <s> c"}]
    rendered = render(messages, template or tokenizer.chat_template, tokenizer)
    assert spans(rendered, tokenizer, True) == ["a</s>b <s> c</s>"]
    assert spans(rendered, tokenizer, False) == ["<s>[INST]Is <s> a tag[/INST]yes</s>[INST]?[/INST]"]
    assert [rendered.tokens.count(i) for i in (1, 2, 3, 4)] == [1, 1, 1, 1]


def test_a_request_has_what_templates_read(tokenizer: HuggingFace) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 2}'}}
    messages = [{"role": "user", "content": "a</s>"}, {"role": "assistant", "tool_calls": [call], "weight": 0}]
    made = request(Conversation(messages, []), [(2, False)], tokenizer)
    assert made.prefixes == [(2, False)] and made.variables["tools"] is None and made.variables["eos_token"] == "</s>"
    user, assistant = made.variables["messages"]
    assert user["content"] == f"a{PLAIN_TEXT_MARKS[0]}</s>{PLAIN_TEXT_MARKS[1]}" and "weight" not in assistant
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"a": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [("a\ufdd2b", r"contains a Unicode noncharacter \(U\+FDD0 to U\+FDD3\)"), ({1, 2}, r"\{1, 2\} has no form in JSON")],
)
def test_what_a_template_cannot_be_given_is_refused(tokenizer: HuggingFace, content: object, message: str) -> None:
    with pytest.raises(Problem, match=message):
        request(Conversation([{"role": "user", "content": content, "name": "x"}], []), [], tokenizer)


def test_marks_of_what_the_assistant_wrote_are_taken_out() -> None:
    assert without_marks("a" + GENERATION[0] + "b" + GENERATION[1]) == "ab"
