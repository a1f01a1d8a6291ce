"""Texts of generated tokens: stop texts, and control tokens by name."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from moe_train import config
from moe_train.data.chat.example import RenderedPrompt
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.evaluate.generation.completion import Completion, StopTexts
from moe_train.evaluate.generation.sampling import Sampling
from moe_train.evaluate.suites import generation
from moe_train.evaluate.suites.generation import LoadedModel, TextOptions, generate_answers
from tests.evaluate.tiny_generator import MIXTRAL, ONE

NO_WEIGHTS = LoadedModel(jax.tree.structure(0), {}, MIXTRAL, ONE, "float32")


def test_texts_stop_texts_and_control_tokens(tokenizer: HuggingFace, monkeypatch: pytest.MonkeyPatch) -> None:
    class Generator:
        """Writes a text, the end token and the length of the prompt."""

        def __init__(self, *arguments: Any) -> None:
            assert arguments[1:] == (MIXTRAL, ONE, "float32", 2)

        def generate(self, prompts: list[list[int]], sampling: Sampling, stops: StopTexts, media: Any) -> list[Completion]:
            assert media == [None] * len(prompts)
            completions = []
            for prompt in prompts:
                tokens = [*tokenizer.encode("some text"), tokenizer.eos_id, *tokenizer.encode(f"{len(prompt)}")]
                completions.append(Completion(tokens, [], "max_tokens" if stops.texts else "end_token"))
            return completions

    monkeypatch.setattr(generation, "Generator", Generator)
    monkeypatch.setattr(generation, "combine", lambda structure, weights: None)
    prompts = [RenderedPrompt(tokenizer.encode("a" * n)) for n in (9, 1, 5)]
    lengths = [len(prompt.tokens) for prompt in prompts]
    done: list[int] = []
    options = TextOptions(config.AnswerGeneration(max_tokens=50), 2)
    answers = generate_answers(NO_WEIGHTS, tokenizer, prompts, options, done.append)
    assert [answer.text for answer in answers] == [f"some text{length}" for length in lengths]
    assert all(answer.finished and tokenizer.eos_id in answer.tokens for answer in answers) and sum(done) == 3
    named = generate_answers(NO_WEIGHTS, tokenizer, prompts[:1], options._replace(keep_special=True), done.append)
    assert named[0].text == f"some text</s>{lengths[0]}"
    stop = TextOptions(config.AnswerGeneration(max_tokens=50, stop=("text", "e t")), 2)
    (stopped,) = generate_answers(NO_WEIGHTS, tokenizer, prompts[:1], stop, done.append)
    assert stopped.text == "som" and not stopped.finished
