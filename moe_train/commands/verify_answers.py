"""`moe-train verify --suite RESULT`: exported files give the answers that the run gave, item by item."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path

import jax

from moe_train.checkpoint.model_dir import open_model
from moe_train.commands.evaluate_suite import load_for, template_of
from moe_train.evaluate.suites.answer import answer_items, prompter_of
from moe_train.evaluate.suites.generation import LoadedModel
from moe_train.evaluate.suites.load import LoadedSuite, SuiteOptions, load_suite
from moe_train.evaluate.suites.reproduce import Reproduction, compare_answers
from moe_train.machine.files import JsonObject, read_object
from moe_train.proof.checks import Check, MetricValue


def verify_answers(directory: Path, result: Path) -> list[Check]:
    """Put the questions of an earlier evaluation to a model, and compare its answers with those that were recorded.

    Nothing is graded, so that neither code of a grader is executed nor a judge asked. The model's own chat template is used.

    Args:
        directory: the model, usually an export of the run that was evaluated.
        result: directory that `evaluate --suite --out` wrote.

    Returns:
        A check for each suite.

    Raises:
        FileNotFoundError: there is no such result, or a suite's file is gone.
        ValueError: a suite is no longer what was asked.
    """
    file = result / "result.json"
    if not file.is_file():
        raise FileNotFoundError(f"{result} has no result.json; name a directory that `moe-train evaluate --suite --out` wrote")
    record = read_object(file)
    suites = _suites(record, file)
    answers = _recorded(result / "items.jsonl", record["model"])
    opened = open_model(directory)
    template = template_of(opened, record["asked"]["chat_template"])
    checks = []
    with jax.set_mesh(opened.mesh):
        structure, weights = load_for(opened, suites)
        model = LoadedModel(structure, weights, opened.model, opened.mesh, opened.compute.dtype)
        for loaded in suites:
            start_time = time.perf_counter()
            prompter = prompter_of(loaded, opened.tokenizer, template)
            given = answer_items(loaded, prompter, model)
            compared = compare_answers(loaded, prompter, model, given, answers[loaded.suite.name])
            checks.append(_check(compared, record["model"], time.perf_counter() - start_time))
    return checks


def _suites(record: JsonObject, file: Path) -> list[LoadedSuite]:
    """Load the suites of a result. Raises ValueError if one of them has changed."""
    asked = record["asked"]
    data = None if asked["data"] is None else Path(asked["data"])
    options = SuiteOptions(asked["overrides"], data, grade=False)
    digests = {row["suite"]: row["digest"] for row in record["suites"]}
    suites = []
    for entry in asked["suites"]:
        loaded = load_suite(Path(entry["file"]), options)
        if loaded.digest != digests[entry["suite"]]:
            raise ValueError(
                f"{entry['file']}: the suite, its items or its examples have changed since {file} was written; restore them, or "
                "evaluate again"
            )
        suites.append(loaded)
    return suites


def _recorded(file: Path, model: str) -> dict[str, dict[str, JsonObject]]:
    """Return the recorded answers of a model by suite and item."""
    answers: dict[str, dict[str, JsonObject]] = defaultdict(dict)
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            answers[row["suite"]][row["id"]] = row["answers"][model]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}:{number}: no row of an evaluation ({type(error).__name__}: {error}); restore the file"
            ) from error
    return answers


def _check(compared: Reproduction, model: str, seconds: float) -> Check:
    metrics: dict[str, MetricValue] = {
        "items": compared.items,
        "near_ties": compared.near_ties,
        "differing": list(compared.differing),
    }
    summary = f"{compared.in_words()}, compared with those of {model}"
    return Check(f"answers to {compared.suite}", not compared.differing, summary, metrics, seconds)
