"""The commands `synthesize` and `improve`: records for training from the graded answers of a model, once or in rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_train.cli.arguments import DATA, TRAINING, AsJson, ChatTemplate, ConfigPath, Overrides, help_examples
from moe_train.cli.terminal import print_json, print_mapping, print_table, progress_line

synthesize_commands = typer.Typer()

# Options of both commands.
Keep = Annotated[
    str | None,
    typer.Option("--keep", metavar="GRADER", help="Name of a grader, or its settings as YAML. Default: the grader of the suite."),
]
MinScore = Annotated[float, typer.Option(min=0, max=1, help="Smallest score of an accepted answer.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer. Default: the suite's, or 256.")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Number of answers that are generated together. Default: the suite's, or 8.")
]
SuiteData = Annotated[Path | None, typer.Option(help="Folder that a suite's items are relative to.")]
GraderFiles = Annotated[list[Path] | None, typer.Option("--grader", help="Python file whose function may grade; may be repeated.")]
JudgeAddress = Annotated[str | None, typer.Option(help="Endpoint of a judge, such as http://localhost:8000/v1.")]


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
    keep: Keep = None,
    form: Annotated[
        Literal["sft", "pairs", "kto"],
        typer.Option("--as", help="sft: accepted answers; pairs: a good and a worse one; kto: all answers, marked good or bad."),
    ] = "sft",
    min_score: MinScore = 1.0,
    temperature: Annotated[float, typer.Option(min=0, help="Temperature of sampling.")] = 1.0,
    max_tokens: MaxTokens = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling; another seed gives other answers.")] = 0,
    batch_size: BatchSize = None,
    suite_data: SuiteData = None,
    grader: GraderFiles = None,
    judge: JudgeAddress = None,
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


@synthesize_commands.command(
    "improve",
    rich_help_panel=TRAINING,
    epilog=help_examples(
        "moe-train improve dpo.yaml --questions questions.jsonl --keep number --suite kpi.yaml --require 'kpi >= base - 0.02' "
        "--rounds 3 --out runs/rounds"
    ),
)
def improve_command(
    config_path: ConfigPath,
    questions: Annotated[
        Path, typer.Option("--questions", metavar="PROMPTS", help="File of items with question and answer, or a suite's YAML.")
    ],
    suite: Annotated[list[Path], typer.Option("--suite", help="Suite that each round has to pass; may be repeated.")],
    require: Annotated[
        list[str],
        typer.Option(
            help="Requirement such as 'kpi >= base - 0.02', against the model before the first round and the round before; exit "
            "code 3 if one is not met. May be repeated."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the rounds: answers, run and gate of each.")],
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds.")] = 3,
    start: Annotated[
        Path | None,
        typer.Option(metavar="RUN_OR_MODEL_DIR", help="Run or model that answers in the first round. Default: init_from."),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=2, help="Number of answers to each question.")] = 4,
    keep: Keep = None,
    min_score: MinScore = 1.0,
    temperature: Annotated[float, typer.Option(min=0.01, help="Temperature of sampling.")] = 1.0,
    max_tokens: MaxTokens = None,
    batch_size: BatchSize = None,
    suite_data: SuiteData = None,
    grader: GraderFiles = None,
    judge: JudgeAddress = None,
    as_json: AsJson = False,
) -> None:
    """Repeat: sample answers of the model, grade them, train CONFIG on them, and compare the result (online DPO by repetition).

    Each round starts from the one before, with another seed. The objective decides what is learned from: preference pairs, answers
    labelled as good or bad, or accepted answers. The same command continues where it was stopped.
    """
    from moe_train.commands.evaluate_suite import SuiteOptions, judge_at
    from moe_train.commands.improve import Rounds, improve
    from moe_train.commands.synthesize import SynthesisOptions
    from moe_train.machine.compile_cache import use_compile_cache

    use_compile_cache(str(out))
    options = SynthesisOptions(
        n, grader=keep, min_score=min_score, temperature=temperature, max_tokens=max_tokens, batch_size=batch_size
    )
    suite_options = SuiteOptions((), suite_data, grader or (), None if judge is None else judge_at(judge))
    rows = list(
        improve(Rounds(config_path, overrides or (), questions, suite, require, out, rounds, start), options, suite_options)
    )
    if as_json:
        print_json(rows)
    else:
        print_table([row for row in rows if "passed" in row])
    if rows[-1]["exit_code"] or not rows[-1]["passed"]:
        raise typer.Exit(rows[-1]["exit_code"] or 3)
