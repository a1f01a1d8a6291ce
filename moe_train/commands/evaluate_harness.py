"""`moe-train evaluate --lm-eval`: tasks of lm-evaluation-harness from local files, over a run or a model in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe_train.checkpoint.identity import WeightsIdentity, weights_identity
from moe_train.checkpoint.model_dir import open_model
from moe_train.commands.evaluate_suite import Comparisons, check_distinct, template_of
from moe_train.evaluate.harness_comparison import HarnessRun, compare_harness, of_requirement
from moe_train.evaluate.paired_comparison import Requirement, parse_requirement, verdicts
from moe_train.evaluate.suites.generation import LoadedModel
from moe_train.evaluate.suites.result import CONFIDENCE, described, requirement_outcome
from moe_train.machine.files import JsonObject, new_directory, refuse_existing, write_text


class HarnessOptions(NamedTuple):
    """How tasks are run."""

    tasks: Sequence[str]
    include_path: Path
    """Folder of the tasks' YAML files."""
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    batch_size: int = 8


class _Evaluated(NamedTuple):
    """What the harness found for one model, and the weights that it has."""

    run: HarnessRun
    identity: WeightsIdentity

    def to_json(self) -> JsonObject:
        """Return the model, its weights and its metrics, ready for JSON."""
        return {
            "model": self.run.name,
            "checkpoint": self.identity.step,
            "sha256": self.identity.sha256,
            "results": {task: _numbers(metrics) for task, metrics in self.run.results.items()},
        }


def evaluate_harness(
    directory: Path,
    options: HarnessOptions,
    chat_template: str | None = None,
    out_dir: Path | None = None,
    comparisons: Comparisons = Comparisons(),  # noqa: B008 (immutable)
) -> JsonObject:
    """Run tasks of lm-evaluation-harness on a run or a model, and compare it item by item with others.

    Only tasks below `include_path` are known, so that none is loaded from a hub by its name.

    Args:
        directory: the run (its named or else newest checkpoint) or the model.
        options: the tasks, and how they are run.
        chat_template: a jinja file, its text, or a name; None for the template of the run or of the model's tokenizer.
        out_dir: directory to create, with results.json and samples.jsonl; None to write nothing.
        comparisons: models to compare with, and requirements on tasks or metrics (TASK/METRIC).

    Returns:
        The metrics of each task, which weights were used, comparisons and requirements; `passed` is false if a requirement is not
        met.

    Raises:
        ValueError: the extra `eval` is not installed, there is no such task, or a requirement is not valid.
        FileNotFoundError: there is no folder of tasks.
    """
    try:
        import lm_eval  # noqa: F401 (whether it is installed)
    except ImportError as error:
        raise ValueError(
            f"--lm-eval needs lm-evaluation-harness, which is not installed ({error}); run bash launch/install.sh eval"
        ) from error
    if not options.include_path.is_dir():
        raise FileNotFoundError(f"--include-path {options.include_path}: no such folder; name that of the tasks' YAML files")
    if out_dir is not None:
        refuse_existing(out_dir)
    requirements = [parse_requirement(text) for text in comparisons.requirements]
    if requirements and not comparisons.against:
        raise ValueError("--require compares with a base; name it with --against RUN_OR_MODEL_DIR")
    paths = (directory, *comparisons.against)
    check_distinct(paths)
    manager = _task_manager(options, requirements)
    evaluated, *bases = [_evaluate(path, options, chat_template, manager) for path in paths]
    result = {**evaluated.to_json(), "against": [base.to_json() for base in bases], "comparisons": [], "requirements": []}
    for base in bases:
        _compare(result, evaluated.run, base.run, requirements)
    result["passed"] = all(requirement["met"] for requirement in result["requirements"])
    if out_dir is not None:
        _write(out_dir, result, [evaluated.run, *(base.run for base in bases)])
    return result


def _write(out_dir: Path, result: JsonObject, runs: Sequence[HarnessRun]) -> None:
    """Write the result, and what each model answered to each item."""
    lines = []
    for run in runs:
        for task, samples in run.samples.items():
            for sample in samples:
                row = {"model": run.name, "task": task, **sample}
                lines.append(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    with new_directory(out_dir) as folder:
        write_text(folder / "results.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        write_text(folder / "samples.jsonl", "".join(lines))


def _task_manager(options: HarnessOptions, requirements: Sequence[Requirement]) -> Any:
    """Return the harness's register of tasks, in which those of the options and requirements are."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(options.include_path), include_defaults=False)
    tasks = [("--lm-eval", task) for task in options.tasks]
    tasks += [("--require", requirement.suite.split("/")[0]) for requirement in requirements]
    for option, task in tasks:
        if task not in manager.all_tasks:
            known = ", ".join(sorted(manager.all_tasks)) or "none"
            raise ValueError(f"{option} {task}: no such task in {options.include_path}; it has {known}")
    return manager


def _evaluate(directory: Path, options: HarnessOptions, chat_template: str | None, manager: Any) -> _Evaluated:
    """Run the tasks on one model; its weights are freed when this returns."""
    from lm_eval.evaluator import simple_evaluate

    from moe_train.evaluate.lm_harness import HarnessModel

    opened = open_model(directory)
    identity = weights_identity(directory)
    template = template_of(opened, chat_template)
    with jax.set_mesh(opened.mesh):
        structure, weights = opened.load()
        loaded = LoadedModel(structure, weights, opened.model, opened.mesh, opened.compute.dtype)
        found: Mapping[str, Any] = simple_evaluate(
            model=HarnessModel(loaded, opened.tokenizer, template, options.batch_size),
            tasks=list(options.tasks),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.apply_chat_template,
            task_manager=manager,
            log_samples=True,
        )
    run = HarnessRun(str(directory), found["results"], found["samples"], found["higher_is_better"])
    return _Evaluated(run, identity)


def _compare(result: JsonObject, new: HarnessRun, old: HarnessRun, requirements: Sequence[Requirement]) -> None:
    """Add the comparison of two models, and what it says of the requirements, to a result."""
    compared = compare_harness(new, old, _aggregate_of, CONFIDENCE)
    for one, verdict in zip(compared, verdicts([one.comparison for one in compared], CONFIDENCE), strict=True):
        row = {**described(old.name, one.comparison), "verdict": verdict}
        if not one.higher_is_better and verdict != "tied":
            row["verdict"] = "worse" if verdict == "better" else "better"
        result["comparisons"].append(row)
    for requirement in requirements:
        comparison = of_requirement(requirement, compared).comparison
        result["requirements"].append(requirement_outcome(requirement, old.name, comparison))


def _aggregate_of(metric: str) -> Callable[[list[Any]], float] | None:
    from lm_eval.api.registry import get_metric_aggregation

    return get_metric_aggregation(metric)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a task that are numbers, as the harness names them: `acc,none`."""
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
