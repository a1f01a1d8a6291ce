"""Prompts of items: chats and texts, solved examples before the question, and where a choice begins."""

from __future__ import annotations

import pytest

from moe_train import config
from moe_train.data.chat.conversation_to_tokens import render_prompt
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.evaluate.suites.items import SuiteItem
from moe_train.evaluate.suites.prompts import Prompter

EXAMPLE = SuiteItem("e", "examples.jsonl:1", [{"role": "user", "content": "What is it?"}], [], ("A string.",))
ITEM = SuiteItem("1", "items.jsonl:1", [{"role": "user", "content": "What does it do?"}], [], ("adds",), ("adds", "returns"))


def test_chat(tokenizer: HuggingFace) -> None:
    prompter = Prompter(config.Prompt(system="Be brief."), [EXAMPLE], tokenizer, tokenizer.chat_template)
    messages = [
        {"role": "system", "content": "Be brief."},
        *EXAMPLE.messages,
        {"role": "assistant", "content": "A string."},
        *ITEM.messages,
    ]
    assert prompter.tokens(ITEM) == render_prompt(messages, tokenizer.chat_template, tokenizer)


def test_text(tokenizer: HuggingFace) -> None:
    prompter = Prompter(config.Prompt(chat=False), [EXAMPLE], tokenizer, None)
    text = "Question: What is it?\nAnswer: A string.\n\nQuestion: What does it do?\nAnswer: "
    assert prompter.tokens(ITEM) == [tokenizer.bos_id, *tokenizer.encode(text)]


def test_no_token_begins_a_text_where_transformers_adds_none(tokenizer: HuggingFace, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for SmolLM2, whose bos_token is the one that begins a turn."""
    monkeypatch.setattr(tokenizer, "adds_bos", False)
    prompter = Prompter(config.Prompt(chat=False), [], tokenizer, None)
    assert prompter.tokens(ITEM) == tokenizer.encode("Question: What does it do?\nAnswer: ")
    prompt, choice = prompter.continuation(ITEM, "adds")
    assert [*prompt, *choice] == tokenizer.encode("Question: What does it do?\nAnswer: adds")
    text, _ = prompter.continuation(ITEM._replace(messages=[]), "adds it")
    assert text == [tokenizer.bos_id]


def test_a_choice_takes_the_space_before_it(tokenizer: HuggingFace) -> None:
    prompter = Prompter(config.Prompt(chat=False), [], tokenizer, None)
    prompt, choice = prompter.continuation(ITEM, "adds")
    assert tokenizer.decode(prompt).endswith("Answer:")
    assert [*prompt, *choice] == [tokenizer.bos_id, *tokenizer.encode("Question: What does it do?\nAnswer: adds")]


def test_a_choice_in_a_chat(tokenizer: HuggingFace) -> None:
    prompter = Prompter(config.Prompt(), [], tokenizer, tokenizer.chat_template)
    prompt, choice = prompter.continuation(ITEM, "adds")
    assert prompt == prompter.tokens(ITEM) and choice == tokenizer.encode("adds")


MMLU = config.Prompt(
    chat=False,
    template="{question}\n{choices}\nAnswer: ",
    preamble="Questions about {category}.\n\n",
    few_shot=config.FewShot(items="dev.csv", count=1, per_category=True),
)
ANATOMY = ITEM._replace(category="anatomy")


def test_choices_categories_and_examples_of_the_same(tokenizer: HuggingFace) -> None:
    others = [EXAMPLE, ANATOMY._replace(messages=[{"role": "user", "content": "A {category}?"}], answers=("returns",))]
    prompter = Prompter(MMLU, others, tokenizer, None, letters=True)
    text = (
        "Questions about anatomy.\n\nA {category}?\nA. adds\nB. returns\nAnswer: B\n\n"
        "What does it do?\nA. adds\nB. returns\nAnswer: "
    )
    assert prompter.tokens(ANATOMY) == [tokenizer.bos_id, *tokenizer.encode(text)]
    with pytest.raises(ValueError, match=r"dev.csv has 0 items of the category tides"):
        prompter.tokens(ITEM._replace(category="tides"))
    messages = [
        {"role": "user", "content": "Questions about anatomy.\n\nA {category}?\nA. adds\nB. returns\nAnswer: "},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "What does it do?\nA. adds\nB. returns\nAnswer: "},
    ]
    chat = Prompter(MMLU.model_copy(update={"chat": True}), others, tokenizer, tokenizer.chat_template, letters=True)
    assert chat.tokens(ANATOMY) == render_prompt(messages, tokenizer.chat_template, tokenizer)


def test_a_text_without_a_question(tokenizer: HuggingFace) -> None:
    text = ITEM._replace(messages=[])
    prompt, rest = Prompter(config.Prompt(), [], tokenizer, None).continuation(text, "adds it")
    assert (prompt, rest) == ([tokenizer.bos_id], tokenizer.encode("adds it"))
    with pytest.raises(ValueError, match="nothing comes before a text without a question"):
        Prompter(config.Prompt(preamble="x"), [], tokenizer, None).continuation(text, "adds it")


def test_what_has_no_form(tokenizer: HuggingFace) -> None:
    system = ITEM._replace(messages=[{"role": "system", "content": "x"}, *ITEM.messages])
    with pytest.raises(ValueError, match=r"items.jsonl:1: both the item and the suite's prompt.system"):
        Prompter(config.Prompt(system="y"), [], tokenizer, tokenizer.chat_template).tokens(system)
    with pytest.raises(ValueError, match=r"items.jsonl:1: the item is a conversation"):
        Prompter(config.Prompt(chat=False), [], tokenizer, None).tokens(system)
    with pytest.raises(ValueError, match="the answer '' has no tokens"):
        Prompter(config.Prompt(), [], tokenizer, tokenizer.chat_template).continuation(ITEM, "")
