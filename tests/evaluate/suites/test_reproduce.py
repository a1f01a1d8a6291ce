"""Answers compared with recorded ones: equal, after a near tie, or otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

from moe_train import config
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.evaluate.suites import reproduce
from moe_train.evaluate.suites.answer import Answer, prompter_of
from moe_train.evaluate.suites.generation import LoadedModel
from moe_train.evaluate.suites.items import SuiteItem
from moe_train.evaluate.suites.likelihood import Continuation
from moe_train.evaluate.suites.load import LoadedSuite
from moe_train.evaluate.suites.reproduce import compare_answers
from tests.evaluate.tiny_generator import MIXTRAL, ONE

NO_WEIGHTS = LoadedModel(jax.tree.structure(0), {}, MIXTRAL, ONE, "float32")
GIVEN = {"equal": (5, 6), "tie": (5, 7, 9), "other": (5, 8), "ended": (5,)}
RECORDED = {"equal": (5, 6), "tie": (5, 6), "other": (5, 6), "ended": (5, 7)}


def test_near_ties(tokenizer: HuggingFace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def log_likelihoods(*arguments: Any) -> list[float]:
        continuations: list[Continuation] = arguments[3]
        asked.extend([*continuation.prompt[-1:], *continuation.text] for continuation in continuations)
        # 7, 6 and the end are equally likely, 8 is not.
        return [-5.0 if continuation.text == [8] else -1.0 for continuation in continuations]

    monkeypatch.setattr(reproduce, "log_likelihoods", log_likelihoods)
    items = [SuiteItem(name, f"items.jsonl:{i}", [{"role": "user", "content": "?"}], [], ("x",)) for i, name in enumerate(GIVEN)]
    prompt = config.Prompt(chat=False, template="{question}")
    suite = config.Suite(name="kpi", items="items.jsonl", grader=config.ExactGrader(name="exact"), prompt=prompt)
    loaded = LoadedSuite(suite, Path("kpi.yaml"), items, [], None, "")
    prompter = prompter_of(loaded, tokenizer, None)
    answers = [Answer(item, "x", None, True, GIVEN[item.id]) for item in items]
    recorded = {name: {"text": "x", "tokens": list(tokens)} for name, tokens in RECORDED.items()}
    compared = compare_answers(loaded, prompter, NO_WEIGHTS, answers, recorded)
    assert (compared.items, compared.near_ties, compared.differing) == (4, 2, ["other"])
    assert compared.in_words() == "1 of 4 answers equal, 2 differ after two equally likely tokens, 1 differ, the first item other"
    assert asked[:2] == [[5, 7], [5, 6]] and [5, tokenizer.eos_id] in asked
    with pytest.raises(ValueError, match="item ended is not in both"):
        compare_answers(loaded, prompter, NO_WEIGHTS, answers[:3], recorded)


def test_choices_and_likelihoods(tokenizer: HuggingFace) -> None:
    item = SuiteItem("1", "items.jsonl:1", [{"role": "user", "content": "?"}], [], ("a",), ("a", "b"))
    suite = config.Suite(name="kpi", items="items.jsonl", grader=config.ChoiceGrader(name="choice"))
    loaded = LoadedSuite(suite, Path("kpi.yaml"), [item], [], None, "")
    prompter = prompter_of(loaded, tokenizer, None)
    for answer, recorded, differing in (
        (Answer(item, "a", 1, True), {"text": "a", "tokens": []}, []),
        (Answer(item, "a", 1, True), {"text": "b", "tokens": []}, ["1"]),
        (Answer(item, "a", 1, True, log_likelihood=-10.0), {"log_likelihood": -10.001}, []),
        (Answer(item, "a", 1, True, log_likelihood=-10.0), {"log_likelihood": -10.1}, ["1"]),
    ):
        assert compare_answers(loaded, prompter, NO_WEIGHTS, [answer], {"1": recorded}).differing == differing
