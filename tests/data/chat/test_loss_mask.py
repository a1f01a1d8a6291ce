"""The loss mask covers what the assistant wrote and its end token, and nothing else."""

from __future__ import annotations

import pytest

from moe_train.data.chat import conversation_to_tokens
from moe_train.data.records.normal_form import Conversation
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.chat.chats import (
    ANSWER,
    CALLS,
    CHATML,
    LAST_USER,
    MARKED,
    QUESTION,
    SEVERAL,
    SINGLE,
    TOOL,
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


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: HuggingFace) -> None:
    with pytest.raises(ValueError, match=r"before message 1 differently .* put \{% generation %\}"):
        render(SINGLE, LAST_USER, tokenizer)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}", "leaves out '</s>'"),
        ("{% generation %}{{ eos_token }}{% endgeneration %}", None),
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


def test_an_id_is_not_learnt(tokenizer: HuggingFace) -> None:
    calls = [{"id": name, "type": "function", "function": {"name": "f", "arguments": '{"q": "zq7"}'}} for name in ("zq7", "x")]
    conversation = Conversation([QUESTION, {"role": "assistant", "tool_calls": calls}], [TOOL])
    (example,) = conversation_to_tokens.examples(conversation, CALLS, tokenizer)
    trained_on = tokenizer.decode([t for t, m in zip(example.tokens, example.loss_mask or (), strict=True) if m], keep_special=True)
    assert trained_on == 'f{"q": "zq7"} id f{"q": "zq7"} id </s>'
