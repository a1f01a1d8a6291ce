"""Reasoning and settings with chat templates: Mistral's and Qwen's spellings, and problems where a template leaves them out."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template

from moe_train import config
from moe_train.data.chat import template as templates
from moe_train.data.chat.conversation_to_tokens import examples
from moe_train.data.chat.example import NEW_USER_TURN, Example
from moe_train.data.records.conversation import read
from moe_train.data.records.normal_form import Conversation, ModelSettings
from moe_train.data.records.problem import Problem
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.chat.chats import CHATML, spans, unmerged
from tests.data.chat.test_mistral import trained
from tests.data.chat.trajectories import predictions
from tests.data.conversations import conversations, texts, thinks
from tests.data.hugging_face import small_tekken, write

ASKED = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
REASONED = ANSWER | {"reasoning_content": "Two and two."}
THOUGHT = {"type": "thinking", "thinking": "Two and two."}
SAID = {"type": "text", "text": "4"}
# As Qwen's: the reasoning of turns before the last question is left out.
QWEN = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '[INST]' }}
{%- if m.reasoning_content and loop.index0 > ns.last %}{{ '<think>' + m.reasoning_content.strip() + '</think>' }}{% endif %}
{{- m.content + '</s>' }}
{%- else %}
{{- '[/INST]' + m.content + '</s>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[INST]' }}{% if enable_thinking is false %}{{ '<think></think>' }}{% endif %}{% endif %}
"""
KEEPS = QWEN.replace(" and loop.index0 > ns.last", "")


@pytest.fixture(scope="module", params=["v13", "v15"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[HuggingFace, Mistral]:
    """A vocabulary and chat format with reasoning, as Hugging Face's files and as mistral-common's."""
    directory = tmp_path_factory.mktemp(request.param)
    file = small_tekken(directory, request.param)
    write(directory, file)
    return HuggingFace(directory), Mistral(file)


def test_a_template_that_writes_reasoning_as_letters(tmp_path: Path) -> None:
    """v11, as Magistral of June 2025: <think> is text in all turns and in system prompts, and mistral-common writes none."""
    file = small_tekken(tmp_path, "v11")
    write(tmp_path, file)
    template = convert_tokenizer_to_chat_template(file, plain_thinking_support=True)
    tokenizer = HuggingFace(tmp_path)
    system = {"role": "system", "content": [{"type": "text", "text": "Draft"}, THOUGHT]}
    middle = {"role": "assistant", "content": [SAID, THOUGHT, {"type": "text", "text": "5"}]}
    cut_off = {"role": "assistant", "content": [THOUGHT | {"closed": False}]}
    fields = {"messages": [system, ASKED, REASONED, ASKED, middle, ASKED, cut_off]}
    (example,) = learned(fields, template, tokenizer)
    thought = "<think>Two and two."
    assert spans(example, tokenizer, True) == [f"{thought}</think>4</s>", f"4{thought}</think>5</s>", f"{thought}</s>"]
    assert spans(example, tokenizer, False)[0] == f"<s>[SYSTEM_PROMPT]Draft{thought}</think>[/SYSTEM_PROMPT][INST]2+2?[/INST]"
    as_text = {"messages": [ASKED, {"role": "assistant", "content": f"{thought}</think>4"}]}
    (written,) = trained(as_text, mistral := Mistral(file))
    assert written.tokens == learned({"messages": [ASKED, REASONED]}, template, tokenizer)[0].tokens
    with pytest.raises(Problem, match=r"has no \[THINK\]; .*, write it into the text as the model does \(<think>"):
        trained({"messages": [ASKED, REASONED]}, mistral)


def learned(fields: dict[str, Any], template: str | None, tokenizer: HuggingFace, **section: Any) -> list[Example]:
    normal = read(fields, config.ChatRecord(name="chat", **section)).record
    assert isinstance(normal, Conversation)
    return examples(normal, template, tokenizer)


def refused(fields: dict[str, Any], template: str | None, tokenizer: HuggingFace, **section: Any) -> Problem:
    with pytest.raises(Problem) as caught:
        learned(fields, template, tokenizer, **section)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("tools", [False, True])
def test_mistrals_templates_give_the_tokens_of_mistral_common(pair: tuple[HuggingFace, Mistral], tools: bool) -> None:
    ours, theirs = pair
    version = theirs.finetuning.version
    roles = ("assistant", "system") if version == "v13" else ("assistant",)
    # Where the templates differ from mistral-common by themselves; see test_template.
    answers = texts(1).map(lambda text: text.rstrip(" ") or "yes")
    results = texts(1).map("result: {}".format)
    num_thinking = 0

    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        conversations(tools=tools, said=texts(1), answers=answers, results=results, parts=True, thinking=roles),
        st.sampled_from([None, {"type": "json_object"}]),
    )
    def compare(record: dict[str, Any], response_format: object) -> None:
        nonlocal num_thinking
        num_thinking += thinks(record)
        for part in itertools.chain.from_iterable(m["content"] for m in record["messages"] if isinstance(m.get("content"), list)):
            part.pop("closed", None)  # no control token would stand between such reasoning and the text
        if version == "v15":
            record |= {"reasoning_effort": "high"} if thinks(record) else {"response_format": response_format}
        found = learned(record, ours.chat_template, ours)
        expected = trained(record, theirs)
        if tools:
            assert predictions(found) == predictions(expected)
        else:
            assert [example._replace(merged=None) for example in found] == expected

    compare()
    assert num_thinking > 3


@pytest.mark.parametrize("template", [QWEN, KEEPS])
def test_a_template_that_reads_a_field_gets_it(tokenizer: HuggingFace, template: str) -> None:
    (example,) = learned({"messages": [ASKED, REASONED]}, template, tokenizer)
    assert spans(example, tokenizer, True) == ["<think>Two and two.</think>4</s>"]
    parts = {"messages": [ASKED, {"role": "assistant", "content": [THOUGHT, SAID, SAID]}]}
    (example,) = learned(parts, template, tokenizer)
    assert spans(example, tokenizer, True) == ["<think>Two and two.</think>4\n\n4</s>"]


def test_each_turn_is_trained_on_with_its_reasoning_though_later_turns_do_not_see_it(tokenizer: HuggingFace) -> None:
    record = {"messages": [ASKED, REASONED, ASKED, REASONED]}
    rows = learned(record, QWEN, tokenizer)
    assert [spans(row, tokenizer, True) for row in rows] == [["<think>Two and two.</think>4</s>"]] * 2
    assert [row.merged.restart for row in rows if row.merged] == [None, NEW_USER_TURN]
    assert "think" not in spans(rows[1], tokenizer, False)[0]
    (row,) = learned(record, KEEPS, tokenizer)
    assert spans(row, tokenizer, True) == ["<think>Two and two.</think>4</s>"] * 2 and len(unmerged([row])) == 2


@pytest.mark.parametrize(
    "template", [CHATML, QWEN.replace("m.reasoning_content", "m.thoughts"), "{# reasoning_content #}" + CHATML]
)
def test_reasoning_that_a_template_leaves_out_is_a_problem(tokenizer: HuggingFace, template: str) -> None:
    parts = {"role": "assistant", "content": [THOUGHT, SAID]}
    for answer, name in ((REASONED, "messages.reasoning_content"), (parts, "content.thinking")):
        record = {"messages": [ASKED, answer]}
        problem = refused(record, template, tokenizer)
        assert problem.rule == "thinking" and "the chat template renders none" in problem.message and name in problem.remedy
        assert learned(record, template, tokenizer, ignore=(name,)) == learned({"messages": [ASKED, ANSWER]}, template, tokenizer)


def test_reasoning_that_a_template_renders_for_some_turns_only_is_a_problem(tokenizer: HuggingFace) -> None:
    first_only = KEEPS.replace("{%- if m.reasoning_content", "{%- if m.reasoning_content and loop.index0 < 2")
    learned({"messages": [ASKED, REASONED]}, first_only, tokenizer)
    problem = refused({"messages": [ASKED, ANSWER, ASKED, REASONED]}, first_only, tokenizer)
    assert "message 3 has reasoning, and the chat template leaves it out" in problem.message


@pytest.mark.parametrize("content", [[SAID, THOUGHT], [THOUGHT | {"closed": False}, SAID], [THOUGHT, SAID, THOUGHT]])
def test_what_a_field_cannot_hold_is_a_problem(tokenizer: HuggingFace, content: list[dict[str, Any]]) -> None:
    problem = refused({"messages": [ASKED, {"role": "assistant", "content": content}]}, QWEN, tokenizer)
    assert "reads reasoning_content" in problem.message
    system = {"role": "system", "content": [THOUGHT, SAID]}
    assert "reads reasoning_content" in refused({"messages": [system, ASKED, ANSWER]}, QWEN, tokenizer).message


def test_variables_reach_the_template(tokenizer: HuggingFace) -> None:
    template = "{{ '[INST]' + (reasoning_effort or '') + style + response_format.type + '[/INST]' }}" + KEEPS
    stated = {"reasoning_effort": "high", "response_format": {"type": "json_object"}, "chat_template_kwargs": {"style": "</s>"}}
    record = {"messages": [ASKED, ANSWER]}
    (example,) = learned(record | stated, template, tokenizer)
    assert spans(example, tokenizer, False)[0].startswith("[INST]high</s>json_object[/INST]")
    assert example.tokens.count(tokenizer.eos_id) == 2  # the style is text
    assert learned(record, template, tokenizer, **stated) == [example]
    prompt = templates.prompt(Conversation([ASKED], [], ModelSettings(**stated)), template, tokenizer)
    assert prompt == example.tokens[: len(prompt)]


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"reasoning_effort": "high"}, "the record has reasoning_effort, and the chat template does not read it"),
        ({"response_format": {"type": "json_object"}}, "the record has response_format, and"),
        ({"chat_template_kwargs": {"enable_thought": True}}, "the chat template does not read 'enable_thought'"),
        ({"chat_template_kwargs": {"messages": []}}, "states elsewhere"),
        ({"chat_template_kwargs": {"eos_token": "."}}, "or the tokenizer has"),
    ],
)
def test_settings_that_a_template_does_not_read_are_a_problem(tokenizer: HuggingFace, stated: dict[str, Any], said: str) -> None:
    assert said in refused({"messages": [ASKED, ANSWER], **stated}, QWEN, tokenizer).message


def test_reasoning_though_a_setting_asks_for_none_is_a_problem(tokenizer: HuggingFace, pair: tuple[HuggingFace, Mistral]) -> None:
    record = {"messages": [ASKED, REASONED]}
    problem = refused(record | {"chat_template_kwargs": {"enable_thinking": False}}, QWEN, tokenizer)
    assert problem.rule == "effort" and "enable_thinking of chat_template_kwargs asks for none" in problem.message
    ours, theirs = pair
    if theirs.finetuning.version == "v15":
        assert "the prompt that the chat template renders asks for none" in refused(record, ours.chat_template, ours).message
        assert refused(record | {"reasoning_effort": "none"}, ours.chat_template, ours).rule == "effort"
        learned(record | {"reasoning_effort": "high"}, ours.chat_template, ours)
