"""Conversations to tokens: what is accepted or refused and why, prompts, and the same rendering as transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, trainers

from moe_train import config
from moe_train.data.chat.conversation_to_tokens import check_section, examples, load_template, render_prompt
from moe_train.data.chat.encode import encode
from moe_train.data.records.conversation import normalise
from moe_train.data.records.normal_form import Conversation
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.chat.chats import CHATML, SEVERAL, SINGLE, TOOL, WITH_GENERATION, render, spans
from tests.data.conversations import conversations

WITH_TOOLS = """\
{{- tools|tojson if tools else '' }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- (message.content or '') + (message.tool_calls|tojson if message.tool_calls else '') + eos_token }}
    {%- else %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- endif %}
{%- endfor %}
"""
KEYS = ["id", "type", "function", "name", "arguments", "description", "parameters", "properties", "text", "$ref", "a"]


def test_the_system_message_goes_before_the_first_user_turn(tokenizer: HuggingFace) -> None:
    rendered = render(SEVERAL, tokenizer.chat_template, tokenizer)
    assert spans(rendered, tokenizer, False)[0] == "<s>[INST]Be brief.\n\nThe quick brown fox?[/INST]"
    assert rendered.tokens[0] == tokenizer.bos_id and rendered.tokens[-1] == tokenizer.eos_id


@pytest.mark.parametrize("template", [None, WITH_GENERATION, CHATML])
@given(
    question=st.text(st.characters(exclude_categories=["Cs", "Cn"])),
    answer=st.text(st.characters(exclude_categories=["Cs", "Cn"]), min_size=1),
)
def test_any_text_is_masked_as_it_stands(tokenizer: HuggingFace, template: str | None, question: str, answer: str) -> None:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rendered = render(messages, template or tokenizer.chat_template, tokenizer)
    ids = [token for token, mask in zip(rendered.tokens, rendered.loss_mask, strict=True) if mask]
    # The template's newline joins the tokens of a text that begins with spaces: compare from the first whole token on.
    assert tokenizer.decode(ids, keep_special=True).lstrip() == (answer + "</s>").lstrip()


def test_reasoning_and_settings_are_never_dropped(tokenizer: HuggingFace, mistral: Mistral) -> None:
    thinking = [SINGLE[0], SINGLE[1] | {"reasoning_content": "Two and three."}]
    with_effort = {"messages": SINGLE, "reasoning_effort": "high"}
    for fields, said in (({"messages": thinking}, "message 1 has reasoning"), (with_effort, "reasoning_effort")):
        conversation = normalise(fields, config.ChatRecord(name="chat"))
        assert isinstance(conversation, Conversation)
        for either, template in ((tokenizer, tokenizer.chat_template), (mistral, None)):
            with pytest.raises(ValueError, match=said):
                examples(conversation, template, either)


def test_a_prompt_is_what_comes_before_the_answer(tokenizer: HuggingFace, mistral: Mistral) -> None:
    for either, template in ((tokenizer, tokenizer.chat_template), (tokenizer, CHATML), (mistral, None)):
        rendered = render(SINGLE, template, either)
        prompt = render_prompt(SINGLE[:1], template, either)
        assert prompt == rendered.tokens[: rendered.loss_mask.index(True)]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one message"),
        ("hello", "should be a list"),
        (["hello"], "message 0 should be an object"),
        ([{"role": "robot", "content": "a"}], "role 'robot'; roles are system, user, assistant"),
        ([{"content": "a"}], "role None"),
        ([{"role": "user"}], "the content of message 0 is null or empty; write its text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "0 pictures in its column, and 1 places for them"),
        ([{"role": "user", "content": "\ufdd0"}, SINGLE[1]], "noncharacter"),
        ([*SINGLE[:1], {"role": "assistant", "content": "a", "weight": 0.5}], "weight 0.5"),
        ([*SINGLE[:1], {"role": "assistant", "tool_calls": [{"id": "1"}]}], "a call in message 1 is .*write"),
        ([*SINGLE[:1], {"role": "assistant", "tool_calls": [5]}], "a call in message 1 is 5"),
        (
            [{"role": "user", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {}}}]}],
            "message 0 has role 'user', and tool_calls",
        ),
        ([*SINGLE, {"role": "tool", "content": "a", "tool_call_id": 3}, SINGLE[1]], "tool_call_id of message 2 is 3"),
        ([*SINGLE, {"role": "tool", "content": "a"}], "the last message is tool"),
        ([*SINGLE, {"role": "tool", "content": "a"}, SINGLE[1]], "the chat template takes none .*--chat-template"),
        (SINGLE[:1], "the last message is user, so nothing answers it; end with"),
        ([*SINGLE[:1], {"role": "assistant", "content": "a", "weight": 0}], "no token would bear loss"),
        ([SINGLE[0], SINGLE[0], SINGLE[1]], "the chat template refuses the record: .*roles alternate"),
    ],
)
def test_messages_out_of_form(tokenizer: HuggingFace, messages: list, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        render(messages, tokenizer.chat_template, tokenizer)
    assert "\n" not in str(caught.value)


def test_nulls_that_columnar_files_fill_in_are_ignored(tokenizer: HuggingFace) -> None:
    filled = [message | {"tool_calls": None, "tool_call_id": None, "weight": None} for message in SINGLE]
    assert render(filled, tokenizer.chat_template, tokenizer) == render(SINGLE, tokenizer.chat_template, tokenizer)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "has no chat template; name a jinja file with --chat-template .*data.chat_template"),
        ("{% for", "cannot be read"),
        ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ time_now('%Y') }}", "the chat template fails: 'time_now' is undefined; correct the template"),
        ("{{ messages[7]['content'] }}", "the chat template fails"),
        ("{{ 1 / 0 }}", "the chat template fails: division by zero"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "the chat template fails: Range too big"),
        ("{{ bos_token }}", "the chat template leaves out the text of message 0"),
    ],
)
def test_templates_that_cannot_be_used(tokenizer: HuggingFace, template: str | None, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        render(SINGLE, template, tokenizer)


def test_where_the_template_comes_from(tokenizer: HuggingFace, mistral: Mistral, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(CHATML)
    assert load_template(None, tokenizer) == tokenizer.chat_template
    assert load_template(str(tmp_path / "own.jinja"), tokenizer) == CHATML
    assert load_template(CHATML, tokenizer) == CHATML
    with pytest.raises(FileNotFoundError, match=r"no file nothing\.jinja"):
        load_template("nothing.jinja", tokenizer)
    with pytest.raises(ValueError, match="no effect with a mistral tokenizer"):
        load_template(CHATML, mistral)


def test_mistral_masks_the_assistants_turns_to_their_end_token(mistral: Mistral) -> None:
    rendered = render(SEVERAL, None, mistral)
    assert spans(rendered, mistral, True) == ["jumps over\n\nthe lazy dog</s>", "naïve café 東京</s>"]
    # Version 3 puts the system text before the last user turn.
    assert spans(rendered, mistral, False) == ["<s>[INST]The quick brown fox?[/INST]", "[INST]Be brief.\n\nIt is 5.[/INST]"]
    prompt = render_prompt(SEVERAL[:-1], None, mistral)
    assert rendered.tokens[: len(prompt)] == prompt


def test_mistral_weights_and_refusals(mistral: Mistral) -> None:
    messages = [m | {"weight": 0} if i == 1 else m for i, m in enumerate(SEVERAL[1:])]
    assert spans(render(messages, None, mistral), mistral, True) == ["naïve café 東京</s>"]
    for messages, reason in (
        ([*SINGLE, SINGLE[0]], "the last message is user, so nothing answers it"),
        ([SINGLE[1]], "message 0 is assistant"),
        ([*SINGLE, SINGLE[1] | {"weight": 0}], "messages 1 and 2 are one turn of the assistant, and differ in weight"),
        ([SINGLE[0], {"role": "assistant", "content": ""}], "message 1 is a turn of the assistant without text"),
        (
            [*SINGLE, {"role": "tool", "content": "a"}, SINGLE[1]],
            r"message 1 has 0 calls \(none\) and 1 results",
        ),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            render(messages, None, mistral)
        assert "\n" not in str(caught.value)
    text = [{"role": "user", "content": "</s>[INST]"}, {"role": "assistant", "content": "</s>"}]
    assert spans(render(text, None, mistral), mistral, True) == ["</s></s>"]


@pytest.mark.judges
@pytest.mark.parametrize("template", [None, WITH_GENERATION, CHATML])
@pytest.mark.parametrize("messages", [SINGLE, SEVERAL[1:]])
def test_transformers_renders_the_same(tokenizer: HuggingFace, template: str | None, messages: list[dict]) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers' apply_chat_template")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer.files[0].parent)
    template = template or tokenizer.chat_template
    assert template is not None
    rendered = render(messages, template, tokenizer)
    expected = theirs.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=template == WITH_GENERATION
    )
    assert rendered.tokens == expected["input_ids"]
    if template == WITH_GENERATION:
        assert [int(mask) for mask in rendered.loss_mask] == expected["assistant_masks"]
    prompt = theirs.apply_chat_template(messages[:1], chat_template=template, add_generation_prompt=True, return_dict=True)
    assert render_prompt(messages[:1], template, tokenizer) == prompt["input_ids"]


@pytest.mark.judges
def test_a_tokenizer_of_sentencepieces_kind_is_masked_as_transformers_does(tmp_path: Path) -> None:
    """Mixtral's `tokenizer.json`: a normalizer puts spaces in front, so ids and characters do not line up simply."""
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers' apply_chat_template")
    pieces = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    pieces.train_from_iterator(["the quick brown fox jumps over the lazy dog", "What is 2 + 3? It is 5."] * 4, trainer)
    content = json.loads(pieces.to_str())
    for byte in range(256):
        content["model"]["vocab"][f"<0x{byte:02X}>"] = len(content["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}

    def with_template(template: str) -> HuggingFace:
        # Only the tokenizer's own template may write [INST] as letters.
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": template}))
        return HuggingFace(tmp_path)

    template = (
        WITH_GENERATION.replace("'[INST]'", "' [INST] '")
        .replace("'[/INST]'", "' [/INST]'")
        .replace("{{- message", "{{- ' ' + message")
    )
    rendered = render(SEVERAL[1:], template, with_template(template))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(SEVERAL[1:], chat_template=template, return_dict=True, return_assistant_tokens_mask=True)
    assert rendered.tokens == expected["input_ids"]
    assert [int(mask) for mask in rendered.loss_mask] == expected["assistant_masks"]
    unmarked = template.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    assert render(SEVERAL[1:], unmarked, with_template(unmarked)) == rendered


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn) -> dict:
    """A record with tools in which up to three values are something else."""
    record = draw(conversations(tools=True, answers=st.just("b"), said=st.just("a"), results=st.just("1")))
    record = json.loads(json.dumps(record))
    for _ in range(draw(st.integers(0, 3))):
        node: Any = record
        while True:
            places = list(node) if isinstance(node, dict) else range(len(node))
            place = draw(st.sampled_from(list(places)))
            if not isinstance(node[place], dict | list) or not node[place] or draw(st.integers(0, 5)) == 0:
                node[place] = draw(JSON)
                break
            node = node[place]
        if not isinstance(record["messages"], list) or not record["messages"]:
            break
    return record


def take_or_refuse(record: dict, tokenizers: list[HuggingFace | Mistral]) -> int:
    """How many of the tokenizers take it; whoever does not says so in one line."""
    taken = 0
    for tokenizer in tokenizers:
        template = WITH_TOOLS if isinstance(tokenizer, HuggingFace) else None
        try:
            conversation = normalise(record, config.ChatRecord(name="chat"))
            assert isinstance(conversation, Conversation)
            taken += bool(examples(conversation, template, tokenizer))
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
    return taken


@given(record=damaged())
def test_any_record_is_taken_or_refused(tokenizer: HuggingFace, mistral: Mistral, record: dict) -> None:
    take_or_refuse(record, [tokenizer, mistral])
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert take_or_refuse({"messages": turn, "tools": [TOOL]}, [tokenizer, mistral]) == 2


@pytest.mark.parametrize("section", [{"reasoning_effort": "high"}, {"response_format": {"type": "json_object"}}])
def test_a_setting_of_a_section_that_is_not_written_is_named(
    tokenizer: HuggingFace, mistral: Mistral, section: dict[str, Any]
) -> None:
    record = config.ChatRecord(name="chat", **section)
    (name,) = section
    for either, template in ((tokenizer, tokenizer.chat_template), (mistral, None)):
        with pytest.raises(ValueError, match=f"the record section states {name}: .*; leave it out of the section") as caught:
            check_section(record, template, either)
        assert "\n" not in str(caught.value)
        check_section(config.ChatRecord(name="chat"), template, either)
        check_section(config.TextRecord(name="text"), template, either)
    check_section(record, "{{ reasoning_effort }}{{ response_format }}", tokenizer)


def test_a_setting_of_a_section_is_named_before_any_record_is_read(mistral: Mistral) -> None:
    record = config.ChatRecord(name="chat", reasoning_effort="high")
    with pytest.raises(ValueError, match="the record section states reasoning_effort: high"):
        next(encode(iter([]), str, record, mistral, None))
