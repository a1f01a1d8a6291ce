"""Prompts as they are served, where a template renders earlier messages otherwise once a turn has been answered."""

from __future__ import annotations

import pytest

from moe_train.data.chat import conversation_to_tokens
from moe_train.data.chat.example import Example
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.chat.chats import ANSWER, CALL, CHATML, LAST_USER, QUESTION, SINGLE, TOOL, spans

SYSTEM = {"role": "system", "content": "Speak French."}
# As Mistral's templates for v0.3 and Nemo: the system text is written only if the last message is a user's.
SYSTEM_IF_LAST = (
    "{% if messages[0].role == 'system' %}{% set s, turns = messages[0].content, messages[1:] %}{% else %}"
    "{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}"
    "{% if m.role == 'user' %}{% if loop.last and s is defined %}"
    "{{ '[INST]' + s + '\n\n' + m.content + '[/INST]' }}{% else %}{{ '[INST]' + m.content + '[/INST]' }}{% endif %}"
    "{% elif m.role == 'tool' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ (m.content or '') + (m.tool_calls|tojson if m.tool_calls else '') + eos_token }}{% endif %}{% endfor %}"
)


def texts(messages: list, template: str, tokenizer: HuggingFace, tools: list | None = None) -> list[tuple[str, list[str]]]:
    """Each example's text, and the parts that are trained on."""
    made = conversation_to_tokens.examples(Conversation(messages, tools or []), template, tokenizer)
    return [(tokenizer.decode(example.tokens, keep_special=True), spans(example, tokenizer, True)) for example in made]


def test_the_system_text_is_in_each_prompt(tokenizer: HuggingFace) -> None:
    messages = [SYSTEM, QUESTION, ANSWER, {"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]
    assert texts(messages, SYSTEM_IF_LAST, tokenizer) == [
        ("<s>[INST]Speak French.\n\na[/INST]b c</s>", ["b c</s>"]),
        ("<s>[INST]a[/INST]b c</s>[INST]Speak French.\n\nd[/INST]e</s>", ["e</s>"]),
    ]
    assert texts(messages[1:], SYSTEM_IF_LAST, tokenizer) == [("<s>[INST]a[/INST]b c</s>[INST]d[/INST]e</s>", ["b c</s>", "e</s>"])]


def test_the_prompt_is_that_of_generation(tokenizer: HuggingFace) -> None:
    messages = [SYSTEM, QUESTION, ANSWER | {"weight": 0}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    (example,) = conversation_to_tokens.examples(Conversation(messages, []), SYSTEM_IF_LAST, tokenizer)
    assert isinstance(example, Example) and example.loss_mask is not None
    prompt = conversation_to_tokens.render_prompt(messages[:4], SYSTEM_IF_LAST, tokenizer)
    assert example.tokens[: example.loss_mask.index(True)] == prompt


def test_what_was_typed_stays_text(tokenizer: HuggingFace) -> None:
    messages = [SYSTEM, {"role": "user", "content": "a[/INST]"}, {"role": "assistant", "content": "a[/INST]</s>"}]
    ((text, trained),) = texts(messages, SYSTEM_IF_LAST, tokenizer)
    assert text == "<s>[INST]Speak French.\n\na[/INST][/INST]a[/INST]</s></s>" and trained == ["a[/INST]</s></s>"]
    (example,) = conversation_to_tokens.examples(Conversation(messages, []), SYSTEM_IF_LAST, tokenizer)
    assert example.tokens.count(tokenizer.eos_id) == 1


def test_marks_of_the_template_do_not_lose_the_system_text(tokenizer: HuggingFace) -> None:
    template = SYSTEM_IF_LAST.replace("{{ (m.content", "{% generation %}{{ (m.content").replace(
        "+ eos_token }}{% endif %}", "+ eos_token }}{% endgeneration %}{% endif %}"
    )
    assert texts([SYSTEM, QUESTION, ANSWER], template, tokenizer)[0][0] == "<s>[INST]Speak French.\n\na[/INST]b c</s>"


def test_ids_of_calls_are_random_behind_a_served_prompt_too(tokenizer: HuggingFace) -> None:
    calling = {"role": "assistant", "tool_calls": [CALL | {"id": "zq7zq7zq7"}]}
    template = SYSTEM_IF_LAST.replace("{{ bos_token }}", "{{ bos_token ~ tools|tojson }}")
    ((text, trained),) = texts([SYSTEM, QUESTION, calling], template, tokenizer, [TOOL])
    assert "Speak French." in text and "zq7" in text and "zq7" not in "".join(trained) and trained[-1].endswith("</s>")


def test_a_marked_last_turn(tokenizer: HuggingFace) -> None:
    assert texts(SINGLE, LAST_USER, tokenizer) == [("(last)[INST]What is 2 + 3?[/INST]It is 5.</s>", ["It is 5.</s>"])]
    assert texts([SYSTEM, *SINGLE], CHATML, tokenizer)[0][1] == ["It is 5.</s>"]


def test_a_prompt_that_is_rewritten_in_all_is_refused(tokenizer: HuggingFace) -> None:
    template = "{% for m in messages %}{{ messages|length ~ m.content ~ messages|length ~ eos_token }}{% endfor %}"
    with pytest.raises(Problem, match=r"before message 1 differently .* put \{% generation %\}") as caught:
        texts(SINGLE, template, tokenizer)
    assert caught.value.rule == "template"
