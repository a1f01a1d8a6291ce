"""The command `evaluate`: loss on files, and graded answers to suites."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moe_train.cli.arguments import MODELS, AsJson, ChatTemplate, ModelDir, Step, help_examples
from moe_train.cli.terminal import print_json, print_mapping, print_table, progress_line

evaluate_commands = typer.Typer()

_PANEL = "With --suite"
_HARNESS_PANEL = "With --lm-eval"
_COMPARISON_PANEL = "With --suite or --lm-eval"


@evaluate_commands.command(
    "evaluate",
    rich_help_panel=MODELS,
    epilog=help_examples(
        "moe-train evaluate runs/quickstart/lora --data runs/quickstart/text/chat_heldout.jsonl",
        "moe-train evaluate runs/tuned --suite kpi.yaml --against base_model --require 'kpi >= base - 0.02' --out results",
        "moe-train evaluate runs/tuned --suite configs/suites/gsm8k.yaml --suite-data data limit=200",
    ),
)
def evaluate_command(
    directory: ModelDir,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Settings that override those of every suite.")
    ] = None,
    data: Annotated[list[Path] | None, typer.Option("--data", help="File of records; may be repeated.")] = None,
    suite: Annotated[
        list[Path] | None, typer.Option("--suite", help="YAML file of a suite, or a folder of them; may be repeated.")
    ] = None,
    suite_data: Annotated[
        Path | None, typer.Option(help="Folder that the suites' items are relative to.", rich_help_panel=_PANEL)
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against", help="Run or model to compare with, item by item; may be repeated.", rich_help_panel=_COMPARISON_PANEL
        ),
    ] = None,
    seed_run: Annotated[
        list[Path] | None,
        typer.Option(help="Run that differs in its seed alone, to be pooled; may be repeated.", rich_help_panel=_PANEL),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            "--require",
            help="Requirement such as 'kpi >= base - 0.02'; exit code 3 if one is not met.",
            rich_help_panel=_COMPARISON_PANEL,
        ),
    ] = None,
    grader: Annotated[
        list[Path] | None,
        typer.Option("--grader", help="Python file whose function may grade; may be repeated.", rich_help_panel=_PANEL),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="Endpoint of a judge, such as http://localhost:8000/v1.", rich_help_panel=_PANEL),
    ] = None,
    judge_cache: Annotated[
        Path | None, typer.Option(help="Folder of the judge's replies. Default: in the user's cache.", rich_help_panel=_PANEL)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Directory to create, with the result, the items and (--suite) a page.", rich_help_panel=_COMPARISON_PANEL
        ),
    ] = None,
    items: Annotated[
        Path | None,
        typer.Option("--items", help="New file for the answers and scores of all items.", rich_help_panel=_PANEL),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Tasks of lm-evaluation-harness, with commas.", rich_help_panel=_HARNESS_PANEL),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of the tasks' YAML files.", rich_help_panel=_HARNESS_PANEL)
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Number of solved examples.", rich_help_panel=_HARNESS_PANEL)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task.", rich_help_panel=_HARNESS_PANEL)] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put questions as turns of a chat.", rich_help_panel=_HARNESS_PANEL)
    ] = False,
    step: Step = None,
    chat_template: ChatTemplate = None,
    as_json: AsJson = False,
) -> None:
    """Measure the loss of a run or a model on files (--data), or grade its answers to questions (--suite, --lm-eval)."""
    from moe_train.commands.at_step import at_step
    from moe_train.commands.evaluate_harness import HarnessOptions, evaluate_harness
    from moe_train.commands.evaluate_suite import Comparisons, Outputs, SuiteOptions, evaluate_suites, judge_at
    from moe_train.machine.compile_cache import use_compile_cache

    if sum(map(bool, (data, suite, lm_eval))) != 1:
        raise typer.BadParameter(
            "state --data FILE for the loss on files, --suite FILE.yaml for graded answers, or --lm-eval TASKS for the harness"
        )
    if lm_eval is None and (include_path or num_fewshot is not None or limit or apply_chat_template):
        raise typer.BadParameter(
            "--include-path, --num-fewshot, --limit and --apply-chat-template have no effect without --lm-eval"
        )
    if not suite and any((overrides, suite_data, seed_run, grader, judge, judge_cache, items)):
        raise typer.BadParameter("overrides, --seed-run, --items and the other options of suites have no effect without --suite")
    if data and (against or require):
        raise typer.BadParameter("--against and --require have no effect on --data; state --suite FILE.yaml or --lm-eval TASKS")
    if data and out:
        raise typer.BadParameter("--out has no effect on --data, whose result is printed; use --json")
    if judge_cache is not None and judge is None:
        raise typer.BadParameter("--judge-cache has no effect without --judge; name the endpoint")
    directory = at_step(directory, step)
    use_compile_cache()
    if data:
        _show_loss(directory, data, chat_template, as_json)
        return
    comparisons = Comparisons(against or (), require or (), seed_run or ())
    if lm_eval:
        if include_path is None:
            raise typer.BadParameter("--lm-eval needs --include-path DIR, the folder of the tasks' YAML files")
        options = HarnessOptions(lm_eval.split(","), include_path, num_fewshot, limit, apply_chat_template)
        with progress_line("evaluating"):
            result = evaluate_harness(directory, options, chat_template, out, comparisons)
    else:
        endpoint = None if judge is None else judge_at(judge, judge_cache)
        suite_options = SuiteOptions(overrides or (), suite_data, grader or (), endpoint)
        with progress_line("evaluating"):
            result = evaluate_suites(directory, suite or [], comparisons, chat_template, suite_options, Outputs(out, items))
    if as_json:
        print_json(result)
    elif lm_eval:
        _print_tasks(result)
    else:
        _print_suites(result)
    if not result["passed"]:
        raise typer.Exit(3)


def _show_loss(directory: Path, data: list[Path], chat_template: str | None, as_json: bool) -> None:
    """Measure the loss on files, and print it; of a classifier also a row for each target and label."""
    from moe_train.commands.evaluate import evaluate_model

    with progress_line("evaluating"):
        answer = evaluate_model(directory, data, chat_template)
    rows = [] if as_json else answer.pop("labels", [])
    print_mapping(answer, as_json)
    if rows:
        print_table(rows)


def _print_tasks(result: dict[str, Any]) -> None:
    """Print the metrics of the harness's tasks for each model, and the comparisons."""
    for evaluated in (result, *result["against"]):
        rows = [{"model": evaluated["model"], "task": task, **metrics} for task, metrics in evaluated["results"].items()]
        print_table(_without(rows, ()))
    print_table(result["comparisons"])
    print_table(result["requirements"])


def _print_suites(result: dict[str, Any]) -> None:
    """Print the scores of suites, the comparisons, and the scores of categories."""
    for part in ("weights", "suites", "comparisons", "requirements"):
        print_table(_without(result[part], ("digest", "categories")))
    print_table(_categories(result["suites"]))


def _without(rows: list[dict[str, Any]], left_out: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return rows that all have the same keys, without some."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in left_out]
    return [{key: row.get(key, "") for key in keys} for row in rows]


def _categories(suites: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each category of the suites that have some."""
    rows: list[dict[str, Any]] = []
    for suite in suites:
        for category, score in suite["categories"].items():
            rows.append({"suite": suite["suite"], "model": suite["model"], "category": category, "score": score})
    return rows
