"""`moe-train evaluate --lm-eval`: tasks of lm-evaluation-harness from local files, over a run or a model in this process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe_train.checkpoint.identity import weights_identity
from moe_train.checkpoint.model_dir import open_model
from moe_train.commands.evaluate_suite import template_of
from moe_train.evaluate.suites.generation import LoadedModel
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


def evaluate_harness(
    directory: Path, options: HarnessOptions, chat_template: str | None = None, out_dir: Path | None = None
) -> JsonObject:
    """Run tasks of lm-evaluation-harness on a run or a model.

    Only tasks below `include_path` are known, so that none is loaded from a hub by its name.

    Args:
        directory: the run (its named or else newest checkpoint) or the model.
        options: the tasks, and how they are run.
        chat_template: a jinja file, its text, or a name; None for the template of the run or of the model's tokenizer.
        out_dir: directory to create, with results.json and samples.jsonl; None to write nothing.

    Returns:
        The metrics of each task, and which weights were used.

    Raises:
        ValueError: the extra `eval` is not installed, or there is no such task.
        FileNotFoundError: there is no folder of tasks.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"--lm-eval needs lm-evaluation-harness, which is not installed ({error}); run bash launch/install.sh eval"
        ) from error
    from moe_train.evaluate.lm_harness import HarnessModel

    if not options.include_path.is_dir():
        raise FileNotFoundError(f"--include-path {options.include_path}: no such folder; name that of the tasks' YAML files")
    if out_dir is not None:
        refuse_existing(out_dir)
    manager = TaskManager(include_path=str(options.include_path), include_defaults=False)
    unknown = [task for task in options.tasks if task not in manager.all_tasks]
    if unknown:
        known = ", ".join(sorted(manager.all_tasks)) or "none"
        raise ValueError(f"--lm-eval {unknown[0]}: no such task in {options.include_path}; it has {known}")
    opened = open_model(directory)
    identity = weights_identity(directory)
    template = template_of(opened, chat_template)
    with jax.set_mesh(opened.mesh):
        structure, weights = opened.load()
        loaded = LoadedModel(structure, weights, opened.model, opened.mesh, opened.compute.dtype)
        found = simple_evaluate(
            model=HarnessModel(loaded, opened.tokenizer, template, options.batch_size),
            tasks=list(options.tasks),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.apply_chat_template,
            task_manager=manager,
            log_samples=True,
        )
    result: JsonObject = {
        "model": str(directory),
        "checkpoint": identity.step,
        "sha256": identity.sha256,
        "results": {task: _numbers(metrics) for task, metrics in found["results"].items()},
    }
    if out_dir is not None:
        samples = [{"task": task, **sample} for task, of_task in found["samples"].items() for sample in of_task]
        with new_directory(out_dir) as folder:
            write_text(folder / "results.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
            lines = (json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
            write_text(folder / "samples.jsonl", "".join(lines))
    return result


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a task that are numbers, as the harness names them: `acc,none`."""
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
