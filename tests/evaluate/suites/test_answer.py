"""Answers of a small model: stop texts, answers that are cut off, and the order of the items."""

from __future__ import annotations

import jax
import pytest

from moe_train import config
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.evaluate.generate import GenerationOptions, decode_after, generate_tokens
from moe_train.evaluate.suites.answer import LoadedModel, answer_items, check_length
from moe_train.evaluate.suites.items import SuiteItem
from moe_train.evaluate.suites.prompts import Prompter
from tests.evaluate.tiny_generator import MIXTRAL, ONE, random_model

QUESTIONS = ("some text to learn from", "text")
ITEMS = [SuiteItem(str(i), f"items.jsonl:{i}", [{"role": "user", "content": q}], [], ("x",)) for i, q in enumerate(QUESTIONS)]
PROMPT = config.Prompt(chat=False, template="{question}")


def test_stop_texts_and_order(tokenizer: HuggingFace) -> None:
    model = MIXTRAL.model_copy(update={"vocab_size": tokenizer.vocab_size})
    prompter = Prompter(PROMPT, [], tokenizer, None)
    with jax.set_mesh(ONE):
        structure, weights = random_model(model)
        prompts = [prompter.tokens(item) for item in ITEMS]
        generated = generate_tokens(structure, weights, model, ONE, prompts, GenerationOptions(6, tuple(tokenizer.end_ids)))
        texts = [decode_after(tokenizer, prompt, new) for prompt, new in zip(prompts, generated, strict=True)]
        stop = texts[0][2]
        suite = config.Suite(
            name="s",
            items="items.jsonl",
            prompt=PROMPT,
            grader=config.ExactGrader(name="exact"),
            generation=config.AnswerGeneration(max_tokens=6, stop=(stop,)),
        )
        answers = answer_items(suite, ITEMS, prompter, LoadedModel(structure, weights, model, ONE, "float32"))
    assert [answer.item.id for answer in answers] == ["0", "1"]
    assert [answer.text for answer in answers] == [text.partition(stop)[0] for text in texts]
    assert answers[0].finished
    assert answers[1].finished == (stop in texts[1] or len(generated[1]) < 6)


def test_a_prompt_without_room() -> None:
    check_length(ITEMS[0], 250, 6, MIXTRAL)
    with pytest.raises(ValueError, match=r"items.jsonl:0: the prompt has 251 tokens; with 6 more it exceeds"):
        check_length(ITEMS[0], 251, 6, MIXTRAL)
