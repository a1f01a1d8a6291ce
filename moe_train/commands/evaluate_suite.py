"""`moe-train evaluate --suite`: answers of a model graded item by item, compared with those of others, and checked by a gate."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe_train import config
from moe_train.checkpoint.identity import weights_identity
from moe_train.checkpoint.model_dir import OpenedModel, open_model
from moe_train.checkpoint.runs import is_run, read_run
from moe_train.config.yaml_file import flat
from moe_train.data.chat.chat_date import date_of_data, dated
from moe_train.data.chat.conversation_to_tokens import load_template
from moe_train.data.records.media import has_media
from moe_train.evaluate.suites.answer import answer_items, check_prompts, prompter_of
from moe_train.evaluate.suites.generation import LoadedModel
from moe_train.evaluate.suites.judge import Endpoint, default_cache
from moe_train.evaluate.suites.load import LoadedSuite, SuiteOptions, load_suites
from moe_train.evaluate.suites.page import page
from moe_train.evaluate.suites.result import Evaluation, ModelAnswers, checked_requirements, item_rows, result_of
from moe_train.machine.files import JsonObject, new_directory, refuse_existing, write_text
from moe_train.model.parameters import Parameters


def judge_at(url: str, cache: Path | None = None) -> Endpoint:
    """Return the endpoint of a judge; its replies are kept in `cache`, or else in the user's cache."""
    return Endpoint(url, cache or default_cache())


class Comparisons(NamedTuple):
    """What to compare a model with, and what the comparison has to show."""

    against: Sequence[Path] = ()
    """Runs or models whose answers are compared with the model's."""
    requirements: Sequence[str] = ()
    """Requirements such as `kpi >= base - 0.02`, which the comparison with every one of them has to meet."""
    seeds: Sequence[Path] = ()
    """Runs of the same config with other seeds, which are pooled with the run."""


class Outputs(NamedTuple):
    """Files to which results are written, besides what is returned."""

    directory: Path | None = None
    """Directory to create: result.json, items.jsonl and report.html."""
    items: Path | None = None
    """New file for every item's answers and scores, as JSON lines."""


def evaluate_suites(
    directory: Path,
    files: Sequence[Path],
    comparisons: Comparisons = Comparisons(),  # noqa: B008 (immutable)
    chat_template: str | None = None,
    options: SuiteOptions = SuiteOptions(),  # noqa: B008 (immutable)
    outputs: Outputs = Outputs(),  # noqa: B008 (immutable)
) -> JsonObject:
    """Grade the answers of a run or a model to suites, and compare them item by item with those of other models.

    Args:
        directory: the run (its named or else newest checkpoint) or the model.
        files: the suites' YAML files, or folders of them.
        comparisons: models to compare with, and requirements.
        chat_template: a jinja file, its text, or a name; None for the template of the run or of the model's tokenizer.
        options: settings for all suites.
        outputs: files to write. None of them is written unless all answers are graded.

    Returns:
        Scores by model and suite, comparisons and requirements; `passed` is false if a requirement is not met.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a suite, an item or a requirement is not valid; nothing has been answered then.
        ConnectionError: a judge does not answer; its replies so far are kept.
    """
    suites = load_suites(files, options)
    names = [loaded.suite.name for loaded in suites]
    requirements = checked_requirements(comparisons.requirements, names, bool(comparisons.against))
    paths = (directory, *comparisons.seeds, *comparisons.against)
    check_distinct(paths)
    _check_seeds(directory, comparisons.seeds)
    if outputs.items is not None and outputs.items.exists():
        raise FileExistsError(f"{outputs.items} exists; name a new file for the items")
    if outputs.directory is not None:
        refuse_existing(outputs.directory)
    models = [_model_to_ask(path, chat_template) for path in paths]
    # The first model is checked before it answers; a fault of the others should not wait for its answers.
    for model in models[1:]:
        for loaded in suites:
            check_prompts(loaded, prompter_of(loaded, model.opened.tokenizer, model.template), model.opened.model)
    answered = [_answers(model, suites) for model in models]
    first_base = 1 + len(comparisons.seeds)
    evaluation = Evaluation(suites, answered[:first_base], answered[first_base:], requirements)
    result = result_of(evaluation)
    _write(evaluation, result, {"chat_template": chat_template, **_options_json(options)}, outputs)
    return result


def check_distinct(models: Sequence[Path]) -> None:
    """Raise ValueError if a model is named twice, also by different paths."""
    if len({path.resolve() for path in models}) < len(models):
        raise ValueError("a model is named twice, and would be compared with itself; name each of them once")


def _write(evaluation: Evaluation, result: JsonObject, stated: JsonObject, outputs: Outputs) -> None:
    """Write the files that were asked for; the directory appears complete or not at all."""
    rows = item_rows(evaluation)
    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    if outputs.items is not None:
        write_text(outputs.items, lines)
    if outputs.directory is None:
        return
    files = [{"suite": loaded.suite.name, "file": str(loaded.file.resolve())} for loaded in evaluation.suites]
    # What `verify --suite` needs to ask the same questions again.
    record = {**result, "asked": {"suites": files, **stated}}
    with new_directory(outputs.directory) as folder:
        write_text(folder / "result.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        write_text(folder / "items.jsonl", lines)
        write_text(folder / "report.html", page(result, rows))


def _options_json(options: SuiteOptions) -> JsonObject:
    return {
        "overrides": list(options.overrides),
        "data": None if options.data is None else str(options.data.resolve()),
        "grader_files": [str(file.resolve()) for file in options.grader_files],
        "judge": None if options.judge is None else options.judge.url,
    }


_MAY_DIFFER = ("seed", "name", "run_dir")
"""Settings in which pooled runs may differ."""


def _check_seeds(directory: Path, others: Sequence[Path]) -> None:
    """Raise ValueError if pooled runs differ in more than their seed, or in nothing."""
    if not others:
        return
    paths = (directory, *others)
    for path in paths:
        if not is_run(path):
            raise ValueError(f"{path} is no run, so its seed is not known; --seed-run pools runs that differ in their seed alone")
    first, *rest = [flat(read_run(path).to_config().model_dump(mode="json")) for path in paths]
    for path, settings in zip(others, rest, strict=True):
        for key in {**first, **settings}:
            if key not in _MAY_DIFFER and first.get(key) != settings.get(key):
                raise ValueError(
                    f"{path} differs from {directory} in {key} ({settings.get(key)}, {first.get(key)}), so they cannot be pooled; "
                    "compare them with --against"
                )
    seeds = [settings["seed"] for settings in (first, *rest)]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the pooled runs have the seeds {', '.join(map(str, seeds))}; each needs a seed of its own")


class _ModelToAsk(NamedTuple):
    """A model whose weights are not loaded yet."""

    opened: OpenedModel
    template: str | None
    """The text of its chat template; None if there is none."""


def _model_to_ask(directory: Path, chat_template: str | None) -> _ModelToAsk:
    """Open a model without its weights. Raises FileNotFoundError if there is none."""
    opened = open_model(directory)
    return _ModelToAsk(opened, template_of(opened, chat_template))


def _answers(model: _ModelToAsk, suites: Sequence[LoadedSuite]) -> ModelAnswers:
    """Let one model answer all suites; its weights are freed when this returns."""
    opened, template = model
    # Only now, since a run that is still trained may have a newer checkpoint than when it was opened.
    identity = weights_identity(opened.directory)
    with jax.set_mesh(opened.mesh):
        structure, weights = load_for(opened, suites)
        loaded_model = LoadedModel(structure, weights, opened.model, opened.mesh, opened.compute.dtype)
        answers = [answer_items(loaded, prompter_of(loaded, opened.tokenizer, template), loaded_model) for loaded in suites]
    return ModelAnswers(str(opened.directory), identity, answers)


def load_for(opened: OpenedModel, suites: Sequence[LoadedSuite]) -> tuple[Any, Parameters]:
    """Load a model, with its tower if a suite has pictures or sound; `mesh` has to be in force."""
    items = itertools.chain.from_iterable(loaded.items for loaded in suites)
    if not any(has_media(message) for item in items for message in item.messages):
        return opened.load()
    opened.check_media()
    structure, weights, _ = opened.load_with_tower()
    return structure, weights


def template_of(opened: OpenedModel, chat_template: str | None) -> str | None:
    """Return the chat template, with the date of the training data, so that prompts have the tokens that training saw."""
    template = opened.chat_template if chat_template is None else load_template(chat_template, opened.tokenizer)
    if template is None:
        return None
    data = opened.run.data if opened.run else None
    return dated(template, date_of_data(data if isinstance(data, config.RunData) else None))
