"""Results of suites: scores, comparisons, answers without a grade, and requirements."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train import config
from moe_train.checkpoint.identity import WeightsIdentity
from moe_train.evaluate.suites.answer import Answer
from moe_train.evaluate.suites.items import SuiteItem
from moe_train.evaluate.suites.load import LoadedSuite
from moe_train.evaluate.suites.result import Evaluation, ModelAnswers, checked_requirements, item_rows, result_of

ITEMS = [SuiteItem(f"{i}", f"items.jsonl:{i}", [], [], ("a",), category="odd" if i % 2 else "even") for i in range(20)]
SUITE = config.Suite(name="kpi", items="items.jsonl", grader=config.ExactGrader(name="exact"))
LOADED = LoadedSuite(SUITE, Path("kpi.yaml"), ITEMS, [], None, "d1")


def model(name: str, scores: list[float | None]) -> ModelAnswers:
    answers = []
    for item, score in zip(ITEMS, scores, strict=True):
        answers.append(Answer(item, f"says {score}", score, True, (), None if score is not None else f"{item.location}: why"))
    return ModelAnswers(name, WeightsIdentity(name, 3, "00ff"), [answers])


NEW, OLD = model("new", [1.0] * 18 + [0.0] * 2), model("old", [0.0] * 6 + [1.0] * 14)


def test_scores_and_comparisons_with_several() -> None:
    requirements = checked_requirements(["kpi >= base - 0.1"], ["kpi"], True)
    result = result_of(Evaluation([LOADED], [NEW], [OLD, model("best", [1.0] * 20)], requirements))
    assert [row["score"] for row in result["suites"]] == [0.9, 0.7, 1.0]
    assert result["suites"][0]["categories"] == {"even": 0.9, "odd": 0.9} and result["suites"][0]["digest"] == "d1"
    assert [row["against"] for row in result["comparisons"]] == ["old", "best"]
    assert result["comparisons"][0]["difference"] == pytest.approx(0.2) and result["comparisons"][0]["verdict"] == "tied"
    assert [row["met"] for row in result["requirements"]] == [True, False] and not result["passed"]
    assert result["weights"][0] == {"model": "new", "checkpoint": 3, "sha256": "00ff"}


def test_answers_without_a_grade_widen_the_interval() -> None:
    known = result_of(Evaluation([LOADED], [NEW], []))["suites"][0]
    scores = [answer.score for answer in NEW.answers[0]]
    unknown = result_of(Evaluation([LOADED], [model("new", [None, *scores[1:]])], [OLD]))
    score = unknown["suites"][0]
    assert score["not_graded"] == 1 and score["score"] == pytest.approx(17 / 19)
    assert score["low"] < known["low"] and score["high"] == known["high"]
    assert unknown["comparisons"][0]["verdict"] == "tied" and unknown["comparisons"][0]["not_graded"] == 1
    with pytest.raises(ValueError, match=r"none of the 20 answers could be graded; the first: items.jsonl:0: why"):
        result_of(Evaluation([LOADED], [model("new", [None] * 20)], []))


def test_equal_scores_of_sources_prove_no_more_than_their_number() -> None:
    items = [item._replace(source=f"{index % 3}") for index, item in enumerate(ITEMS)]
    given = [Answer(item, "a", 1.0, True) for item in items]
    score = result_of(Evaluation([LOADED._replace(items=items)], [NEW._replace(answers=[given])], []))["suites"][0]
    # A share of 1 - 0.025 ** (1 / 3) of the sources may score 0 unseen.
    assert (score["low"], score["high"]) == (pytest.approx(0.025 ** (1 / 3)), 1.0)


def test_pooled_seeds() -> None:
    result = result_of(Evaluation([LOADED], [NEW, model("seed 2", [1.0] * 17 + [0.0] * 3)], [OLD]))
    (comparison,) = result["comparisons"]
    assert comparison["new"] == pytest.approx(0.875) and "2 runs" in comparison["method"]


def test_rows_and_perplexity() -> None:
    rows = item_rows(Evaluation([LOADED], [NEW], [OLD]))
    assert rows[19]["answers"]["new"] == {"text": "says 0.0", "score": 0.0, "finished": True, "tokens": []}
    measured = NEW._replace(answers=[[Answer(i, "a", 0.5, True, log_likelihood=-2.0, text_tokens=4) for i in ITEMS]])
    assert result_of(Evaluation([LOADED], [measured], []))["suites"][0]["perplexity"] == pytest.approx(1.6487, rel=1e-4)


def test_requirements_that_cannot_be_checked() -> None:
    with pytest.raises(ValueError, match="name it with --against"):
        checked_requirements(["kpi >= base"], ["kpi"], False)
    with pytest.raises(ValueError, match="names the suite other; the suites are kpi"):
        checked_requirements(["other >= base"], ["kpi"], True)
