"""The loss mask covers what the assistant wrote and its end token, and nothing else."""

from __future__ import annotations

import pytest

from moe_train.data.chat import conversation_to_tokens
from moe_train.data.chat.example import NEW_USER_TURN, REWRITTEN
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.chat import trajectories
from tests.data.chat.chats import (
    ANSWER,
    CHATML,
    MARKED,
    QUESTION,
    SEVERAL,
    WITH_GENERATION,
    render,
    spans,
)


@pytest.mark.parametrize("template", [None, WITH_GENERATION])
def test_the_mask_is_the_assistants_turns_to_their_end_token(tokenizer: HuggingFace, template: str | None) -> None:
    rendered = render(SEVERAL[1:], template or tokenizer.chat_template, tokenizer)
    assert spans(rendered, tokenizer, True) == ["jumps over\n\nthe lazy dog</s>", "naïve café 東京 </s>"]


@pytest.mark.parametrize("template", [None, WITH_GENERATION])
def test_what_the_user_said_bears_no_loss(tokenizer: HuggingFace, template: str | None) -> None:
    rendered = render(SEVERAL[1:], template or tokenizer.chat_template, tokenizer)
    assert spans(rendered, tokenizer, False) == ["<s>[INST]The quick brown fox?[/INST]", "[INST]It is 5.[/INST]"]


def test_neither_the_generation_prompt_nor_the_newline_after_a_turn_bears_loss(tokenizer: HuggingFace) -> None:
    rendered = render(SEVERAL, CHATML, tokenizer)
    assert spans(rendered, tokenizer, True) == ["jumps over\n\nthe lazy dog</s>", "naïve café 東京 </s>"]


@pytest.mark.parametrize("template", [None, WITH_GENERATION])
def test_a_turn_of_weight_0_bears_no_loss(tokenizer: HuggingFace, template: str | None) -> None:
    messages = [m | {"weight": 0} if i == 1 else m for i, m in enumerate(SEVERAL[1:])]
    rendered = render(messages, template or tokenizer.chat_template, tokenizer)
    assert spans(rendered, tokenizer, True) == ["naïve café 東京 </s>"]
    assert rendered.tokens == render(SEVERAL[1:], template or tokenizer.chat_template, tokenizer).tokens


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}", "leaves out '</s>'"),
        ("{{ m.content }}{% generation %}{{ eos_token }}{% endgeneration %}", "leaves out 'b c'"),
        ("{{ ' ' }}{% generation %}{{ m.content + eos_token + ' ' }}{% endgeneration %}", None),
    ],
)
def test_marks_and_prefixes_have_to_agree(tokenizer: HuggingFace, body: str, said: str | None) -> None:
    template = MARKED.replace("BODY", body)
    if said is None:
        conversation_to_tokens.examples(Conversation([QUESTION, ANSWER], []), template, tokenizer)
        return
    with pytest.raises(ValueError, match=f"generation %}} {said}, unlike what the assistant's turns add"):
        conversation_to_tokens.examples(Conversation([QUESTION, ANSWER], []), template, tokenizer)


def test_marks_that_reach_too_far_do_not_agree(tokenizer: HuggingFace) -> None:
    template = "{% generation %}" + CHATML + "{% endgeneration %}"
    with pytest.raises(ValueError, match=r"generation %} marks .*unlike"):
        conversation_to_tokens.examples(Conversation([QUESTION, ANSWER], []), template, tokenizer)


TOOLS_CHATML = (
    "{% if tools %}<s>system\n{{ tools|tojson }}</s>\n{% endif %}{% for m in messages %}<s>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function|tojson + ' id ' + c.id }}{% endfor %}"
    "{% if m.role == 'tool' %}{{ ' for ' + m.tool_call_id }}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
MARKED_CALLS = (
    "{% if tools %}{{ tools|tojson }}{% endif %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{% for c in m.tool_calls or [] %}{{ c.function|tojson + ' id ' + c.id }}{% endfor %}"
    "{{ (m.content or '') + eos_token }}{% endgeneration %}{% else %}{{ '[INST]' + m.content + '[/INST]' }}{% endif %}{% endfor %}"
)
SAID = (
    "{% if m.role == 'assistant' %}{% for c in m.tool_calls or [] %}{{ c.function|tojson + c.id }}{% endfor %}"
    "{{ (m.content or '') + eos_token }}{% else %}"
)
TOOLS_LAST = (
    "{% for m in messages %}{% set rest = messages[loop.index0:]|map(attribute='role')|list %}"
    "{% if m.role == 'user' and 'user' not in rest[1:] %}{{ tools|tojson }}{% endif %}"
    + SAID
    + "{{ '[INST]' + m.content + '[/INST]' }}{% endif %}{% endfor %}"
)
ONLY_LAST_RESULTS = (
    "{{ tools|tojson }}{% for m in messages %}{% set rest = messages[loop.index0:]|map(attribute='role')|list %}"
    + SAID
    + "{{ '[INST]' + (m.content if m.role == 'user' or 'assistant' not in rest[:-1] else 'omitted') + '[/INST]' }}"
    + "{% endif %}{% endfor %}"
)
CONVERSATIONS = (
    trajectories.agent(4, parallel=2),
    trajectories.conversation(
        trajectories.asked(),
        trajectories.called(0, 3, backwards=True),
        trajectories.said(weight=0),
        trajectories.asked("</s>More?"),
        trajectories.called(1, weight=0),
        trajectories.called(2),
        trajectories.said("Done </s>."),
    ),
)


@pytest.mark.parametrize(
    ("template", "restarts"),
    [
        (TOOLS_CHATML, ([None], [None])),
        (MARKED_CALLS, ([None], [None])),
        (TOOLS_LAST, ([None], [None, NEW_USER_TURN])),
        (ONLY_LAST_RESULTS, ([None, *[REWRITTEN] * 3], None)),  # results before a turn of weight 0 are in no example
    ],
)
def test_turns_share_an_example_where_their_renderings_continue_one_another(
    tokenizer: HuggingFace, template: str, restarts: tuple[list[str | None], list[str | None] | None]
) -> None:
    for conversation, expected in zip(CONVERSATIONS, restarts, strict=True):
        if expected is None:
            with pytest.raises(Problem, match="leaves out the result of message 2"):
                conversation_to_tokens.examples(conversation, template, tokenizer)
            continue
        merged = conversation_to_tokens.examples(conversation, template, tokenizer)
        assert [example.merged.restart for example in merged if example.merged] == expected
        if template == ONLY_LAST_RESULTS:  # alone, a turn lacks the results that only the turn before it shows
            with pytest.raises(Problem, match="leaves out the result of message 2"):
                trajectories.separate(conversation, template, tokenizer)
            continue
        separate = trajectories.separate(conversation, template, tokenizer)
        assert trajectories.predictions(merged) == trajectories.predictions(separate)
        num_separate = sum(len(example.tokens) for example in separate)
        assert sum(example.merged.separate_tokens for example in merged if example.merged) == num_separate
        assert not any("call0" in tokenizer.decode(trajectories.trained_ids(example)) for example in merged)
