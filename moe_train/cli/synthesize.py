"""The command `synthesize`: records for training from the graded answers of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_train.cli.arguments import DATA, AsJson, ChatTemplate, help_examples
from moe_train.cli.terminal import print_mapping, progress_line

synthesize_commands = typer.Typer()


@synthesize_commands.command(
    "synthesize",
    rich_help_panel=DATA,
    epilog=help_examples(
        "moe-train synthesize questions.jsonl --teacher runs/tuned --keep number --n 8 --as pairs --out round_1",
        "moe-train synthesize kpi.yaml --teacher big_model --out answers --seed 1",
    ),
)
def synthesize_command(
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS", help="File of items with question and answer, or a suite's YAML.")],
    teacher: Annotated[Path, typer.Option("--teacher", metavar="RUN_OR_MODEL_DIR", help="Run or model that answers.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Directory to create: records.jsonl, origins.jsonl and manifest.json.")
    ],
    n: Annotated[int, typer.Option("--n", min=1, help="Number of answers to each question.")] = 4,
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep", metavar="GRADER", help="Name of a grader, or its settings as YAML. Default: the grader of the suite."
        ),
    ] = None,
    form: Annotated[
        Literal["sft", "pairs", "kto"],
        typer.Option("--as", help="sft: accepted answers; pairs: a good and a worse one; kto: all answers, marked good or bad."),
    ] = "sft",
    min_score: Annotated[float, typer.Option(min=0, max=1, help="Smallest score of an accepted answer.")] = 1.0,
    temperature: Annotated[float, typer.Option(min=0, help="Temperature of sampling.")] = 1.0,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer. Default: the suite's, or 256.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling; another seed gives other answers.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Number of answers that are generated together. Default: the suite's, or 8.")
    ] = None,
    suite_data: Annotated[Path | None, typer.Option(help="Folder that a suite's items are relative to.")] = None,
    grader: Annotated[
        list[Path] | None, typer.Option("--grader", help="Python file whose function may grade; may be repeated.")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="Endpoint of a judge, such as http://localhost:8000/v1.")] = None,
    chat_template: ChatTemplate = None,
    as_json: AsJson = False,
) -> None:
    """Sample answers to questions, grade them, and write SFT records, preference pairs or KTO records.

    With the model that is being trained as its own teacher and a new --seed for each round, sampling, grading and training repeat.
    """
    from moe_train.commands.evaluate_suite import SuiteOptions, judge_at
    from moe_train.commands.synthesize import SynthesisOptions, synthesize
    from moe_train.machine.compile_cache import use_compile_cache

    if n > 1 and temperature == 0:
        raise typer.BadParameter("with --temperature 0 all answers to a question are equal; state --n 1, or a temperature above 0")
    if form == "pairs" and n == 1:
        raise typer.BadParameter("--as pairs compares answers to the same question; state --n 2 or more")
    use_compile_cache()
    options = SynthesisOptions(n, form, keep, min_score, temperature, max_tokens, seed, chat_template, batch_size)
    suite_options = SuiteOptions((), suite_data, grader or (), None if judge is None else judge_at(judge))
    with progress_line("synthesizing"):
        result = synthesize(prompts, teacher, out, options, suite_options)
    print_mapping(result, as_json)
