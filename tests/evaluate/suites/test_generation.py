"""Texts of generated tokens: stop texts, and control tokens by name."""

from __future__ import annotations

import jax
import pytest

from moe_train import config
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.evaluate.suites import generation
from moe_train.evaluate.suites.generation import LoadedModel, TextOptions, generate_answers
from tests.evaluate.tiny_generator import MIXTRAL, ONE

NO_WEIGHTS = LoadedModel(jax.tree.structure(0), {}, MIXTRAL, ONE, "float32")


def test_order_stop_texts_and_control_tokens(tokenizer: HuggingFace, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []

    def generate(_structure: object, _weights: object, _model: object, _mesh: object, prompts: list[list[int]], _options: object):
        batches.append([len(prompt) for prompt in prompts])
        return [[*tokenizer.encode("some text"), tokenizer.eos_id, *tokenizer.encode(f"{len(prompt)}")] for prompt in prompts]

    monkeypatch.setattr(generation, "generate_tokens", generate)
    prompts = [tokenizer.encode("a" * n) for n in (9, 1, 5)]
    lengths = [len(prompt) for prompt in prompts]
    done: list[int] = []
    options = TextOptions(config.AnswerGeneration(max_tokens=50), 2)
    answers = generate_answers(NO_WEIGHTS, tokenizer, prompts, options, done.append)
    assert [answer.text for answer in answers] == [f"some text{length}" for length in lengths]
    assert batches == [sorted(lengths)[:2], sorted(lengths)[2:]] and done == [2, 1]
    assert all(answer.finished and tokenizer.eos_id in answer.tokens for answer in answers)
    named = generate_answers(NO_WEIGHTS, tokenizer, prompts[:1], options._replace(keep_special=True), done.append)
    assert named[0].text == f"some text</s>{lengths[0]}"
    stop = TextOptions(config.AnswerGeneration(max_tokens=1, stop=("text", "e t")), 2)
    (stopped,) = generate_answers(NO_WEIGHTS, tokenizer, prompts[:1], stop, done.append)
    assert stopped.text == "som" and stopped.finished
