"""What an evaluation on suites found: scores, comparisons with other models, requirements, and every item's answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import exp
from typing import NamedTuple

from moe_train import config
from moe_train.checkpoint.identity import WeightsIdentity
from moe_train.evaluate.intervals import (
    NO_ERROR,
    Interval,
    equal_values_interval,
    mean_and_error,
    mean_interval,
    rate_interval,
)
from moe_train.evaluate.paired_comparison import Comparison, Requirement, Scores, parse_requirement, verdicts
from moe_train.evaluate.pooled_comparison import compare_pooled
from moe_train.evaluate.suites.answer import Answer
from moe_train.evaluate.suites.load import LoadedSuite
from moe_train.evaluate.suites.word_errors import word_errors
from moe_train.machine.files import JsonObject

CONFIDENCE = 0.95
"""Level of all intervals, and of verdicts over all suites together."""


class ModelAnswers(NamedTuple):
    """The answers of one model to all suites."""

    name: str
    """How the user named it."""
    identity: WeightsIdentity
    answers: Sequence[Sequence[Answer]]
    """The answers by suite and item."""


class Evaluation(NamedTuple):
    """An evaluation: suites, the models that answered them, and requirements."""

    suites: Sequence[LoadedSuite]
    models: Sequence[ModelAnswers]
    """The model in question, then runs that differ from it in their seed alone."""
    bases: Sequence[ModelAnswers]
    """The models to compare with."""
    requirements: Sequence[Requirement] = ()


def checked_requirements(texts: Sequence[str], names: Sequence[str], has_base: bool) -> list[Requirement]:
    """Parse requirements. Raises ValueError if one names no suite, or there is nothing to compare with."""
    requirements = [parse_requirement(text) for text in texts]
    if requirements and not has_base:
        raise ValueError("--require compares with a base; name it with --against RUN_OR_MODEL_DIR")
    for requirement in requirements:
        if requirement.suite not in names:
            raise ValueError(f"--require names the suite {requirement.suite}; the suites are {', '.join(names)}")
    return requirements


def result_of(evaluation: Evaluation) -> JsonObject:
    """Return the scores, comparisons and requirements of an evaluation, ready for JSON.

    `passed` is false if a requirement is not met. Verdicts hold for all suites together (Holm).

    Raises:
        ValueError: No item of a suite could be graded.
    """
    result: JsonObject = {
        "model": evaluation.models[0].name,
        "weights": [_identity(model) for model in (*evaluation.models, *evaluation.bases)],
        "confidence": CONFIDENCE,
        "suites": [],
        "comparisons": [],
        "requirements": [],
        "passed": True,
    }
    for model in (*evaluation.models, *evaluation.bases):
        for loaded, answers in zip(evaluation.suites, model.answers, strict=True):
            result["suites"].append(_score(loaded, model.name, answers))
    for base in evaluation.bases:
        compared = []
        for place, loaded in enumerate(evaluation.suites):
            runs = [_scores(model.answers[place]) for model in evaluation.models]
            groups = _groups(base.answers[place])
            compared.append(compare_pooled(loaded.suite.name, runs, _scores(base.answers[place]), groups, CONFIDENCE))
        # The verdicts hold for all suites together.
        for comparison, verdict in zip(compared, verdicts(compared, CONFIDENCE), strict=True):
            result["comparisons"].append({**described(base.name, comparison), "verdict": verdict})
        for requirement in evaluation.requirements:
            [comparison] = [comparison for comparison in compared if comparison.suite == requirement.suite]
            outcome = requirement_outcome(requirement, base.name, comparison)
            result["requirements"].append(outcome)
            result["passed"] = result["passed"] and outcome["met"]
    return result


def item_rows(evaluation: Evaluation) -> list[JsonObject]:
    """Return one row for each item, with the answers of all models side by side."""
    rows: list[JsonObject] = []
    for place, loaded in enumerate(evaluation.suites):
        for index, item in enumerate(loaded.items):
            given: JsonObject = {}
            for model in (*evaluation.models, *evaluation.bases):
                given[model.name] = _answer_json(model.answers[place][index])
            expected: object = item.answers
            if item.tool_calls is not None:
                expected = [call._asdict() for call in item.tool_calls]
            rows.append(
                {
                    "suite": loaded.suite.name,
                    "id": item.id,
                    "where": item.location,
                    "category": item.category,
                    "messages": item.messages,
                    "expected": expected,
                    "answers": given,
                }
            )
    return rows


def _answer_json(answer: Answer) -> JsonObject:
    """Return an answer; what it does not have is left out."""
    fields: JsonObject = {"text": answer.text, "score": answer.score, "finished": answer.finished, "tokens": list(answer.tokens)}
    if answer.problem is not None:
        fields["problem"] = answer.problem
    if answer.log_likelihood is not None:
        fields |= {"log_likelihood": answer.log_likelihood, "text_tokens": answer.text_tokens}
    return fields


def _identity(model: ModelAnswers) -> JsonObject:
    return {"model": model.name, "checkpoint": model.identity.step, "sha256": model.identity.sha256}


def _score(loaded: LoadedSuite, model: str, answers: Sequence[Answer]) -> JsonObject:
    """Describe the score of one model on one suite: mean, interval, categories, and answers that were cut off.

    Answers that could not be graded are not in the mean; the interval reaches over all scores that they may have.
    """
    graded = [answer.score for answer in answers if answer.score is not None]
    if not graded:
        reason = next(answer.problem for answer in answers)
        raise ValueError(f"suite {loaded.suite.name}: none of the {len(answers)} answers could be graded; the first: {reason}")
    sources = [source_of(answer) for answer in answers]
    low = _interval([0.0 if answer.score is None else answer.score for answer in answers], sources).low
    high = _interval([1.0 if answer.score is None else answer.score for answer in answers], sources).high
    by_category: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        if answer.item.category is not None and answer.score is not None:
            by_category[answer.item.category].append(answer.score)
    fields: JsonObject = {
        "suite": loaded.suite.name,
        "model": model,
        "grader": loaded.suite.grader.name,
        "items": len(answers),
        "score": sum(graded) / len(graded),
        "low": max(low, 0.0),
        "high": min(high, 1.0),
        "not_graded": len(answers) - len(graded),
        "cut_off": sum(not answer.finished for answer in answers),
        "categories": {name: sum(values) / len(values) for name, values in sorted(by_category.items())},
        "digest": loaded.digest,
    }
    grader = loaded.suite.grader
    if isinstance(grader, config.WordErrorRateGrader):
        return {**fields, "word_error_rate": _word_error_rate(grader, answers)}
    perplexity = _perplexity(answers)
    return fields if perplexity is None else {**fields, "perplexity": perplexity}


def _word_error_rate(grader: config.WordErrorRateGrader, answers: Sequence[Answer]) -> float:
    """Return the word error rate of all answers together."""
    compared = [word_errors(grader, answer.item, answer.text) for answer in answers]
    return sum(of_answer.errors for of_answer in compared) / sum(of_answer.words for of_answer in compared)


def _interval(scores: Sequence[float], sources: Sequence[tuple[str, str]]) -> Interval:
    """Return Wilson's interval for independent items that are solved or not, Student's for scores that vary otherwise."""
    if set(scores) <= {0.0, 1.0} and len(set(sources)) == len(sources):
        return rate_interval(int(sum(scores)), len(scores), CONFIDENCE)
    mean = mean_and_error(scores, sources)
    if mean.error < NO_ERROR:
        # Student's interval would have no width, as if further items could not differ.
        return equal_values_interval(mean.value, mean.units, 0.0, 1.0, CONFIDENCE)
    return mean_interval(scores, sources, CONFIDENCE)


def _perplexity(answers: Sequence[Answer]) -> float | None:
    """Return the perplexity of all tokens together; None for other graders."""
    totals = [answer.log_likelihood for answer in answers if answer.log_likelihood is not None]
    if not totals:
        return None
    # Limited, since exp overflows float64 beyond 709.
    return exp(min(-sum(totals) / sum(answer.text_tokens for answer in answers), 700))


def _scores(answers: Sequence[Answer]) -> Scores:
    return {answer.item.id: answer.score for answer in answers}


def source_of(answer: Answer) -> tuple[str, str]:
    """Return what an item was made from; an item that states no source is its own, which no stated one can equal."""
    if answer.item.source is None:
        return ("item", answer.item.id)
    return ("source", answer.item.source)


def _groups(answers: Sequence[Answer]) -> dict[str, object] | None:
    """Return the group of each item; None if no item states a source."""
    if all(answer.item.source is None for answer in answers):
        return None
    return {answer.item.id: source_of(answer) for answer in answers}


def described(base: str, comparison: Comparison) -> JsonObject:
    """Return a comparison with a model, ready for JSON; its verdict depends on other suites, too."""
    return {
        "suite": comparison.suite,
        "against": base,
        "old": comparison.old_mean,
        "new": comparison.new_mean,
        "difference": comparison.difference,
        "low": comparison.interval.low,
        "high": comparison.interval.high,
        "not_graded": comparison.ungraded,
        "p_value": comparison.p_value,
        "method": comparison.method,
    }


def requirement_outcome(requirement: Requirement, base: str, comparison: Comparison) -> JsonObject:
    """Return whether a comparison meets a requirement, with the bounds that decide it."""
    return {
        "suite": requirement.suite,
        "against": base,
        "lower_bound": comparison.interval.low,
        "must_be_at_least": 0 - requirement.margin,
        "met": requirement.is_met(comparison),
    }
