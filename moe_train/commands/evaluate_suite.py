"""`moe-train evaluate --suite`: answers of a model graded item by item, compared with those of others, and checked by a gate."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from moe_train import config
from moe_train.checkpoint.model_dir import OpenedModel, open_model
from moe_train.config.yaml_file import load_section
from moe_train.data.chat.chat_date import date_of_data, dated
from moe_train.data.chat.conversation_to_tokens import load_template
from moe_train.evaluate.intervals import mean_interval, rate_interval
from moe_train.evaluate.paired_comparison import Comparison, Requirement, compare, parse_requirement, verdicts
from moe_train.evaluate.suites.answer import Answer, LoadedModel, answer_items
from moe_train.evaluate.suites.grade import check_item
from moe_train.evaluate.suites.items import SuiteItem, read_items
from moe_train.evaluate.suites.prompts import Prompter
from moe_train.machine.files import JsonObject, write_text


class LoadedSuite(NamedTuple):
    """A suite with its items."""

    suite: config.Suite
    items: list[SuiteItem]
    examples: list[SuiteItem]
    """Solved examples that come before each question."""


class Comparisons(NamedTuple):
    """What to compare a model with, and what the comparison has to show."""

    against: Sequence[Path] = ()
    """Runs or models whose answers are compared with the model's."""
    requirements: Sequence[str] = ()
    """Requirements such as `kpi >= base - 0.02`, which the comparison with every one of them has to meet."""


def evaluate_suites(
    directory: Path,
    files: Sequence[Path],
    comparisons: Comparisons = Comparisons(),  # noqa: B008 (immutable)
    chat_template: str | None = None,
    items_to: Path | None = None,
) -> JsonObject:
    """Grade the answers of a run or a model to suites, and compare them item by item with those of other models.

    Args:
        directory: the run (its named or else newest checkpoint) or the model.
        files: the suites' YAML files.
        comparisons: models to compare with, and requirements.
        chat_template: a jinja file, its text, or a name; None for the template of the run or of the model's tokenizer.
        items_to: file to write every item's answers and scores to, as JSON lines; it must not exist yet.

    Returns:
        Scores by suite, comparisons and requirements; `passed` is false if a requirement is not met.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a suite, an item or a requirement is not valid; nothing has been answered then.
    """
    suites = [load_suite(file) for file in files]
    requirements = _checked_requirements(comparisons, [loaded.suite.name for loaded in suites])
    if items_to is not None and items_to.exists():
        raise FileExistsError(f"{items_to} exists; name a new file for the items")
    answers = {str(path): _answers(path, suites, chat_template) for path in (directory, *comparisons.against)}
    result: JsonObject = {"model": str(directory), "suites": [], "comparisons": [], "requirements": [], "passed": True}
    for loaded, given in zip(suites, answers[str(directory)], strict=True):
        result["suites"].append(_score(loaded.suite, given))
    for base in map(str, comparisons.against):
        compared = []
        for loaded, new, old in zip(suites, answers[str(directory)], answers[base], strict=True):
            compared.append(_compare(loaded.suite.name, new, old))
        result["comparisons"] += _described(base, compared)
        for requirement in requirements:
            [comparison] = [comparison for comparison in compared if comparison.suite == requirement.suite]
            met = requirement.is_met(comparison)
            result["requirements"].append(_outcome(requirement, base, comparison, met))
            result["passed"] = result["passed"] and met
    if items_to is not None:
        write_text(items_to, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in _rows(suites, answers)))
    return result


def load_suite(file: Path) -> LoadedSuite:
    """Read a suite and its items, and check that each item has what the grader needs.

    Raises:
        FileNotFoundError: The suite or a file that it names does not exist.
        ValueError: With file and line, for what is not valid.
    """
    suite = load_section(file, config.Suite)
    items = read_items(file.parent / suite.items, suite.limit)
    for item in items:
        check_item(item, suite.grader)
    examples: list[SuiteItem] = []
    few_shot = suite.prompt.few_shot
    if few_shot is not None:
        examples = read_items(file.parent / few_shot.items, few_shot.count)
        if len(examples) < few_shot.count:
            raise ValueError(f"{file}: prompt.few_shot.count is {few_shot.count}, but {few_shot.items} has {len(examples)} items")
        for example in examples:
            if not example.answers:
                raise ValueError(f"{example.location}: a solved example needs an answer; add it")
    return LoadedSuite(suite, items, examples)


def _checked_requirements(comparisons: Comparisons, names: Sequence[str]) -> list[Requirement]:
    """Parse the requirements. Raises ValueError if one names no suite, or there is nothing to compare with."""
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"two suites have the name {twice[0]}; give each a name of its own")
    requirements = [parse_requirement(text) for text in comparisons.requirements]
    if requirements and not comparisons.against:
        raise ValueError("--require compares with a base; name it with --against RUN_OR_MODEL_DIR")
    for requirement in requirements:
        if requirement.suite not in names:
            raise ValueError(f"--require names the suite {requirement.suite}; the suites are {', '.join(names)}")
    return requirements


def _answers(directory: Path, suites: Sequence[LoadedSuite], chat_template: str | None) -> list[list[Answer]]:
    """Let one model answer all suites; its weights are freed when this returns."""
    opened = open_model(directory)
    template = _template(opened, chat_template)
    with jax.set_mesh(opened.mesh):
        structure, weights = opened.load()
        loaded = LoadedModel(structure, weights, opened.model, opened.mesh, opened.compute.dtype)
        answers = []
        for suite, items, examples in suites:
            prompter = Prompter(suite.prompt, examples, opened.tokenizer, template)
            answers.append(answer_items(suite, items, prompter, loaded))
        return answers


def _template(opened: OpenedModel, chat_template: str | None) -> str | None:
    """Return the chat template, with the date of the training data, so that prompts have the tokens that training saw."""
    template = opened.chat_template if chat_template is None else load_template(chat_template, opened.tokenizer)
    if template is None:
        return None
    data = opened.run.data if opened.run else None
    return dated(template, date_of_data(data if isinstance(data, config.RunData) else None))


def _score(suite: config.Suite, answers: Sequence[Answer]) -> JsonObject:
    """Describe the score of one suite: mean, interval, categories, and answers that were cut off."""
    scores = [answer.score for answer in answers]
    sources = [_source(answer) for answer in answers]
    if set(scores) <= {0.0, 1.0} and len(set(sources)) == len(sources):
        interval = rate_interval(int(sum(scores)), len(scores))
    else:
        interval = mean_interval(scores, sources)
    by_category: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        if answer.item.category is not None:
            by_category[answer.item.category].append(answer.score)
    return {
        "suite": suite.name,
        "grader": suite.grader.name,
        "items": len(scores),
        "score": sum(scores) / len(scores),
        "low": max(interval.low, 0.0),
        "high": min(interval.high, 1.0),
        "cut_off": sum(not answer.finished for answer in answers),
        "categories": {name: sum(values) / len(values) for name, values in sorted(by_category.items())},
    }


def _source(answer: Answer) -> tuple[str, str]:
    """Return what an item was made from; an item that states no source is its own, which no stated one can equal."""
    if answer.item.source is None:
        return ("item", answer.item.id)
    return ("source", answer.item.source)


def _compare(name: str, new: Sequence[Answer], old: Sequence[Answer]) -> Comparison:
    groups = None
    if any(answer.item.source is not None for answer in new):
        groups = {answer.item.id: _source(answer) for answer in new}
    return compare(name, {a.item.id: a.score for a in new}, {a.item.id: a.score for a in old}, groups)


def _described(base: str, comparisons: Sequence[Comparison]) -> list[JsonObject]:
    """Describe the comparisons with one model, with verdicts that hold for all suites together."""
    rows: list[JsonObject] = []
    for comparison, verdict in zip(comparisons, verdicts(comparisons), strict=True):
        rows.append(
            {
                "suite": comparison.suite,
                "against": base,
                "old": comparison.old_mean,
                "new": comparison.new_mean,
                "difference": comparison.difference,
                "low": comparison.interval.low,
                "high": comparison.interval.high,
                "p_value": comparison.p_value,
                "verdict": verdict,
                "method": comparison.method,
            }
        )
    return rows


def _outcome(requirement: Requirement, base: str, comparison: Comparison, met: bool) -> JsonObject:
    return {
        "suite": requirement.suite,
        "against": base,
        "lower_bound": comparison.interval.low,
        "must_be_at_least": -requirement.margin,
        "met": met,
    }


def _rows(suites: Sequence[LoadedSuite], answers: dict[str, list[list[Answer]]]) -> list[JsonObject]:
    """Return one row for each item, with the answers of all models side by side."""
    rows: list[JsonObject] = []
    for place, (suite, items, _) in enumerate(suites):
        for index, item in enumerate(items):
            given = {}
            for model, of_suites in answers.items():
                answer = of_suites[place][index]
                given[model] = {"text": answer.text, "score": answer.score, "finished": answer.finished}
            rows.append({"suite": suite.name, "id": item.id, "where": item.location, "expected": item.answers, "answers": given})
    return rows
