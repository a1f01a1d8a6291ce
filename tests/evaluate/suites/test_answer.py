"""Answers of a small model: stop texts, answers that are cut off, and the order of the items."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import pytest

from moe_train import config
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.evaluate.generate import GenerationOptions, decode_after, generate_tokens
from moe_train.evaluate.suites import answer
from moe_train.evaluate.suites.answer import answer_items, check_length, prompter_of
from moe_train.evaluate.suites.generation import GeneratedText, LoadedModel
from moe_train.evaluate.suites.grade import text_grader
from moe_train.evaluate.suites.items import SuiteItem
from moe_train.evaluate.suites.load import LoadedSuite
from moe_train.evaluate.suites.not_graded import NotGraded
from moe_train.evaluate.suites.prompts import Prompter
from tests.evaluate.tiny_generator import MIXTRAL, ONE, random_model

QUESTIONS = ("some text to learn from", "text")
ITEMS = [SuiteItem(str(i), f"items.jsonl:{i}", [{"role": "user", "content": q}], [], ("x",)) for i, q in enumerate(QUESTIONS)]
PROMPT = config.Prompt(chat=False, template="{question}")
FEW = config.AnswerGeneration(max_tokens=6)
PERPLEXITY_SUITE = config.Suite(name="p", items="items.jsonl", prompt=PROMPT, grader=config.PerplexityGrader(name="perplexity"))
TEXT = SuiteItem("t", "items.jsonl:3", [], [], ("a text without a question",))
PERPLEXITY = LoadedSuite(PERPLEXITY_SUITE, Path("p.yaml"), [*ITEMS, TEXT], [], None, "")
NO_WEIGHTS = LoadedModel(jax.tree.structure(0), {}, MIXTRAL, ONE, "float32")


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
        loaded = LoadedSuite(suite, Path("s.yaml"), ITEMS, [], text_grader(suite.grader), "")
        answers = answer_items(loaded, prompter_of(loaded, tokenizer, None), LoadedModel(structure, weights, model, ONE, "float32"))
        measured = answer_items(PERPLEXITY, prompter, LoadedModel(structure, weights, model, ONE, "float32"))
    assert [given.item.id for given in answers] == ["0", "1"]
    assert [given.text for given in answers] == [text.partition(stop)[0] for text in texts]
    # Generation goes on to the token in which a stop text ends.
    assert [given.tokens for given in answers] == [tuple(new[: len(g.tokens)]) for g, new in zip(answers, generated, strict=True)]
    assert answers[0].finished
    assert answers[1].finished == (stop in texts[1] or len(generated[1]) < 6)

    # The geometric mean of the probabilities, and what the perplexity of all tokens is computed from.
    for one in measured:
        assert one.log_likelihood is not None and one.score is not None
        assert one.score == pytest.approx(math.exp(one.log_likelihood / one.text_tokens))
        assert 0 < one.score < 0.1


def test_an_answer_that_cannot_be_graded(monkeypatch: pytest.MonkeyPatch, tokenizer: HuggingFace) -> None:
    def generate(model: LoadedModel, tokenizer: HuggingFace, prompts: list[list[int]], *_: object) -> list[GeneratedText]:
        return [GeneratedText((1,), f"text {i}", True) for i in range(len(prompts))]

    def grade(item: SuiteItem, text: str) -> float:
        if text == "text 1":
            raise NotGraded("the grader is at a loss")
        return 1.0

    monkeypatch.setattr(answer, "generate_answers", generate)
    for grader in (config.ExactGrader(name="exact"), config.JudgeGrader(name="judge", model="m")):
        suite = config.Suite(name="s", items="items.jsonl", prompt=PROMPT, grader=grader, generation=FEW)
        loaded = LoadedSuite(suite, Path("s.yaml"), ITEMS, [], grade, "")
        first, second = answer_items(loaded, prompter_of(loaded, tokenizer, None), NO_WEIGHTS)
        assert first.score == 1 and second.score is None
        assert second.problem == "items.jsonl:1: the grader is at a loss"


def test_a_prompt_without_room() -> None:
    check_length(ITEMS[0], 250, 6, MIXTRAL)
    with pytest.raises(ValueError, match=r"items.jsonl:0: the prompt has 251 tokens; with 6 more it exceeds"):
        check_length(ITEMS[0], 251, 6, MIXTRAL)
