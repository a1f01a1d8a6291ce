"""What a template leaves out, cannot stop or writes as letters is a problem that names its cause; templates of families pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from moe_train.data.chat import conversation_to_tokens
from moe_train.data.chat.chat_date import dated
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.chat.chats import ANSWER, CALL, CHATML, QUESTION, TOOL, WITH_GENERATION, spans
from tests.data.chat.families import FAMILIES, LLAMA_3, Family, write_family
from tests.data.conversations import conversations

SYSTEM = {"role": "system", "content": "Speak French."}
LOOKED_UP = CALL | {"function": {"name": "f", "arguments": '{"word": "quokka", "n": 7}'}}
CALLING = {"role": "assistant", "content": "I look it up.", "tool_calls": [LOOKED_UP]}
RESULT = {"role": "tool", "tool_call_id": CALL["id"], "name": "f", "content": '{"kind": "marsupial"}'}
LATER = [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e f"}]


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tokenizer: HuggingFace, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Family, HuggingFace, str]:
    chosen = FAMILIES[request.param]
    made = write_family(tmp_path_factory.mktemp("family") / request.param, chosen, tokenizer)
    assert made.chat_template is not None
    return chosen, made, dated(made.chat_template, "2026-11-29")


def test_families_of_templates(family: tuple[Family, HuggingFace, str]) -> None:
    chosen, tokenizer, template = family
    for messages in ([QUESTION, ANSWER], [QUESTION, ANSWER, *LATER], [SYSTEM, QUESTION, ANSWER, *LATER]):
        if not chosen.system and messages[0] == SYSTEM:
            with pytest.raises(Problem, match="refuses the record: System role not supported; change or drop"):
                conversation_to_tokens.examples(Conversation(messages, []), template, tokenizer)
            continue
        made = conversation_to_tokens.examples(Conversation(messages, []), template, tokenizer)
        trained = [part.strip() for example in made for part in spans(example, tokenizer, True)]
        assert [part.removesuffix(chosen.end).strip() for part in trained] == ["b c", "e f"][: len(trained)]
        assert len(trained) == sum(m["role"] == "assistant" for m in messages) and all(t.endswith(chosen.end) for t in trained)
        assert (messages[0] != SYSTEM) or all("Speak French." in tokenizer.decode(e.tokens) for e in made[-1:])


def test_families_with_tools(family: tuple[Family, HuggingFace, str]) -> None:
    chosen, tokenizer, template = family
    calling = CALLING
    if chosen.template == LLAMA_3:  # which writes no text beside a call
        calling = {"role": "assistant", "tool_calls": [LOOKED_UP]}
    conversation = Conversation([SYSTEM, QUESTION, calling, RESULT, ANSWER], [TOOL])
    if not chosen.tools:
        with pytest.raises(Problem, match=r"the record has tools, and the chat template .*--chat-template"):
            conversation_to_tokens.examples(conversation, template, tokenizer)
        return
    made = conversation_to_tokens.examples(conversation, template, tokenizer)
    trained = [part for example in made for part in spans(example, tokenizer, True)]
    assert "quokka" in "".join(trained) and trained[-1].strip().endswith("b c" + chosen.end) and "marsupial" not in "".join(trained)


def test_a_turn_without_its_end(tokenizer: HuggingFace) -> None:
    no_end = "{% for m in messages %}{{ '[INST]' + m.content + '[/INST]' if m.role == 'user' else m.content }}{% endfor %}"
    before_user = no_end.replace("{{ '[INST]'", "{{ (eos_token if not loop.first else '') + '[INST]'")
    for template in (no_end, before_user):
        with pytest.raises(Problem, match=r"ends a turn of the assistant with .*, and not with </s>: .* learn to stop") as caught:
            conversation_to_tokens.examples(Conversation([QUESTION, ANSWER, *LATER], []), template, tokenizer)
        assert caught.value.rule == "template"
    typed = [QUESTION, ANSWER | {"content": "b</s>"}]
    with pytest.raises(Problem, match="learn to stop"):
        conversation_to_tokens.examples(Conversation(typed, []), no_end, tokenizer)


def test_markers_that_the_tokenizer_lacks(tokenizer: HuggingFace, tmp_path: Path) -> None:
    chatml = CHATML.replace("<s>", "<|im_start|>")
    for template in (chatml.replace("</s>", "<|im_end|>"), chatml):
        with pytest.raises(Problem, match=r"writes <\|im_(start|end)\|>, and .*tokenizer.json has no such token") as caught:
            conversation_to_tokens.examples(Conversation([QUESTION, ANSWER], []), template, tokenizer)
        assert caught.value.remedy.startswith("use the tokenizer that the template was made for")
    typed = Conversation([{"role": "user", "content": "What is <|im_start|>?"}, ANSWER], [])
    assert conversation_to_tokens.examples(typed, CHATML, tokenizer)
    zephyr = FAMILIES["zephyr"]
    own = write_family(tmp_path / "zephyr", zephyr, tokenizer)
    assert conversation_to_tokens.examples(Conversation([QUESTION, ANSWER], []), own.chat_template, own)
    with pytest.raises(Problem, match=r"<\|user\|>"):  # here they are letters by mistake
        conversation_to_tokens.examples(Conversation([QUESTION, ANSWER], []), zephyr.template, tokenizer)


def test_an_end_of_turn_that_ends_no_generation(tokenizer: HuggingFace, tmp_path: Path) -> None:
    made = write_family(tmp_path / "gemma", FAMILIES["gemma"], tokenizer)
    (tmp_path / "gemma" / "generation_config.json").unlink()
    assert made.end_tokens == ("<eos>", "<end_of_turn>")
    without = HuggingFace(tmp_path / "gemma")
    with pytest.raises(Problem, match="with <end_of_turn>, and a generation ends with <eos>; name <end_of_turn> as eos_token"):
        conversation_to_tokens.examples(Conversation([QUESTION, ANSWER], []), without.chat_template, without)
    stated = json.loads((tmp_path / "gemma" / "tokenizer_config.json").read_text())
    (tmp_path / "gemma" / "tokenizer_config.json").write_text(json.dumps(stated | {"eos_token": "<end_of_turn>"}))
    corrected = HuggingFace(tmp_path / "gemma")
    assert conversation_to_tokens.examples(Conversation([QUESTION, ANSWER], []), corrected.chat_template, corrected)


def test_no_image_is_trained_on(tokenizer: HuggingFace, tmp_path: Path) -> None:
    family = FAMILIES["qwen"]
    made = write_family(tmp_path / "vl", family._replace(specials=(*family.specials, "<|image_pad|>")), tokenizer)
    template = WITH_GENERATION.replace("message['content'] + eos_token", "'<|image_pad|>' + message['content'] + eos_token")
    template = template.replace("{{- bos_token }}", "").replace("[INST]", "Q: ").replace("[/INST]", " A: ")
    with pytest.raises(Problem, match=r"contains <\|image_pad\|>, the placeholder of an image") as caught:
        conversation_to_tokens.examples(Conversation([QUESTION, ANSWER], []), template, made)
    assert caught.value.rule == "image"
    typed = [QUESTION, ANSWER | {"content": "write <|image_pad|>"}]
    assert conversation_to_tokens.examples(Conversation(typed, []), family.template, made)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(record=conversations(tools=True, content_beside_calls=True))
def test_conversations_in_chatml(record: dict, chatml: HuggingFace) -> None:
    conversation = Conversation(record["messages"], record["tools"])
    made = conversation_to_tokens.examples(conversation, chatml.chat_template, chatml)
    assert all(example.loss_mask is not None and example.loss_mask[-2] and not example.loss_mask[-1] for example in made)


@pytest.fixture(scope="module")
def chatml(tokenizer: HuggingFace, tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    template = conversation_to_tokens.read_template("chatml")
    return write_family(tmp_path_factory.mktemp("chatml"), FAMILIES["qwen"]._replace(template=template), tokenizer)


def test_the_masks_of_the_packaged_template(chatml: HuggingFace) -> None:
    conversation = Conversation([SYSTEM, QUESTION, CALLING, RESULT, ANSWER, *LATER], [TOOL])
    made = conversation_to_tokens.examples(conversation, chatml.chat_template, chatml)
    assert [part for example in made for part in spans(example, chatml, True)] == [
        'I look it up.\n<tool_call>\n{"name": "f", "arguments": {"word": "quokka", "n": 7}}\n</tool_call><|im_end|>',
        "b c<|im_end|>",
        "e f<|im_end|>",
    ]
    prompt = conversation_to_tokens.render_prompt([SYSTEM, QUESTION], chatml.chat_template, chatml)
    assert chatml.decode(prompt, keep_special=True) == (
        "<|im_start|>system\nSpeak French.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )
