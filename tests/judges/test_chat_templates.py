"""transformers' apply_chat_template as the judge: templates like those of model families, and generated conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template

from moe_train.data.chat import conversation_to_tokens
from moe_train.data.chat.chat_date import dated, today
from moe_train.data.records.normal_form import Conversation
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.chat.families import FAMILIES, MISTRAL_V3, Family, write_family
from tests.data.conversations import conversations, thinks
from tests.data.hugging_face import small_tekken, write

pytestmark = pytest.mark.judges
WORDS = st.text(st.characters(include_characters="aé東 \n'\"{}", categories=["L", "N", "P"]), min_size=1, max_size=30).filter(
    str.strip
)
CHATML = Family(
    conversation_to_tokens.read_template("chatml"), FAMILIES["qwen"].specials, None, "<|im_end|>", "<|im_end|>", tools=True
)


@pytest.fixture(scope="module", params=[*FAMILIES, "chatml", "named"])
def family(
    request: pytest.FixtureRequest, tokenizer: HuggingFace, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Family, HuggingFace]:
    chosen = CHATML if request.param in ("chatml", "named") else FAMILIES[request.param]
    directory = tmp_path_factory.mktemp("judged") / request.param
    made = write_family(directory, chosen, tokenizer)
    if request.param == "named":
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates" / "tool_use.jinja").write_text(chosen.template)
        default = "\n{% for m in messages %}\n  {{ m.role + m.content }}<|im_end|>\n{% endfor %}\n\n"
        (directory / "chat_template.jinja").write_text(default)
        made = HuggingFace(directory)
    return chosen, made


def judged(tokenizer: HuggingFace, judge: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
    plain = json.loads(json.dumps([{key: value for key, value in m.items() if key != "weight"} for m in messages]))
    for message in plain:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return judge.apply_chat_template(plain, tools=tools or None, return_dict=True)["input_ids"]


@pytest.mark.parametrize("tools", [False, True])
def test_the_ids_are_transformers(family: tuple[Family, HuggingFace], tools: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers' apply_chat_template")
    chosen, tokenizer = family
    if tools and not chosen.tools:
        return
    judge = transformers.PreTrainedTokenizerFast.from_pretrained(Path(tokenizer.files[0]).parent)
    assert tokenizer.chat_template is not None
    template = dated(tokenizer.chat_template, today())
    compared = 0

    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(conversations(tools=tools, max_calls=1, said=WORDS, answers=WORDS, results=WORDS))
    def compare(record: dict[str, Any]) -> None:
        nonlocal compared
        conversation = Conversation(record["messages"], record.get("tools", []))
        if any(token in json.dumps(record, ensure_ascii=False) for token in tokenizer.special_tokens):
            return  # typed as text, it is text here, and a control token there
        (made,) = conversation_to_tokens.examples_batch([conversation], template, tokenizer)
        if isinstance(made, ValueError):
            system = conversation.messages[0]["role"] == "system"
            # Mistral's template writes no system text if the last message of the prompt is a result.
            assert system and (not chosen.system or (chosen.template == MISTRAL_V3 and "(system)" in str(made))), made
            return
        expected = judged(tokenizer, judge, conversation.messages, conversation.tools)
        if made[-1].tokens == expected:
            compared += 1
        else:  # rendered as it is served: prompts and answers of each turn
            assert chosen.template == MISTRAL_V3 and conversation.messages[0]["role"] == "system"

    compare()
    assert compared >= 5


@pytest.mark.parametrize("tools", [False, True])
def test_reasoning_that_v11_writes_as_letters(tmp_path: Path, tools: bool) -> None:
    """mistral-common's own template for Magistral of June 2025, rendered by transformers."""
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers' apply_chat_template")
    file = small_tekken(tmp_path, "v11")
    write(tmp_path, file)
    template = convert_tokenizer_to_chat_template(file, plain_thinking_support=True)
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = HuggingFace(tmp_path)
    judge = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    reasoned = 0

    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        conversations(
            tools=tools, max_calls=1, said=WORDS, answers=WORDS, results=WORDS, thinking=("system", "assistant"), thoughts=WORDS
        )
    )
    def compare(record: dict[str, Any]) -> None:
        nonlocal reasoned
        conversation = Conversation(record["messages"], record.get("tools", []))
        if any(token in json.dumps(record, ensure_ascii=False) for token in tokenizer.special_tokens):
            return
        *_, last = conversation_to_tokens.examples(conversation, template, tokenizer)
        assert last.tokens == judged(tokenizer, judge, conversation.messages, conversation.tools)
        reasoned += thinks(record)

    compare()
    assert reasoned >= 1
