"""The commands `moe-train data …`: check, show and prepare data before training on them, and trace rows to their records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_train.cli.arguments import AsJson, ChatTemplate, ConfigPath, Overrides, help_examples, read_config
from moe_train.cli.data_options import (
    STATED_BY_CONFIG,
    ChatDate,
    ColumnMap,
    Ignore,
    LongestStretch,
    ReadingOptions,
    ReasoningEffort,
    RecordFormat,
    TokenizerPath,
    dated_template,
    load_tokenizer,
    refuse_options,
    source_of_file,
    sources_to_check,
)
from moe_train.cli.data_search import search_commands
from moe_train.cli.terminal import print_json, print_mapping, print_table, progress_line, stdout_console
from moe_train.machine import progress
from moe_train.machine.cores import cpu_cores

if TYPE_CHECKING:
    from moe_train.config import FileSource

_TEACHER = "With a teacher"

data_commands = typer.Typer(name="data", help="Check, show and prepare data before training on them.", no_args_is_help=True)
data_commands.add_typer(search_commands)


@data_commands.command(
    "check",
    epilog=help_examples(
        "moe-train data check runs/quickstart/text/chat_train.jsonl --tokenizer runs/quickstart/tokenizer --seq-len 256",
        "moe-train data check --config configs/quickstart_lora.yaml",
    ),
)
def check_command(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILES",
            help="Files, folders or globs of JSON lines, JSON, CSV, TSV, Parquet, Arrow or text, compressed or not.",
        ),
    ] = None,
    tokenizer: TokenizerPath = None,
    config_path: Annotated[
        Path | None, typer.Option("--config", help="Config of a run whose data.train is checked with its own settings.")
    ] = None,
    layout: RecordFormat = "auto",
    columns: ColumnMap = None,
    ignore: Ignore = None,
    chat_template: ChatTemplate = None,
    chat_date: ChatDate = None,
    reasoning_effort: ReasoningEffort = None,
    longest_stretch: LongestStretch = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens in a training row.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows in an optimizer step.")] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="EVAL_FILES", help="Evaluation files to search for the same records; may be repeated."),
    ] = None,
    bench: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Output of `bench --json`, to estimate how long an epoch takes.")
    ] = None,
    fix: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Directory for a corrected copy of the files and a list of the changes.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report what --fix would change, and write nothing.")] = False,
    sample: Annotated[int | None, typer.Option(min=1, metavar="N", help="Check about N records spread over the files.")] = None,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="RULE", help="Rule whose violations are accepted; may be repeated.")
    ] = None,
    pii: Annotated[bool, typer.Option("--pii", help="Also search for personal data and secrets; --fix replaces them.")] = False,
    phone_region: Annotated[
        str | None, typer.Option(metavar="COUNTRY", help="With --pii: country of phone numbers without +, such as DE.")
    ] = None,
    show: Annotated[int, typer.Option(min=1, help="Problems to list for each rule; all are counted.")] = 10,
    num_proc: Annotated[int | None, typer.Option(min=1, help="Number of processes. Default: one per CPU core.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find problems in records, and estimate what training on them takes.

    Exit code: 0 no problems, 1 problems found, 2 the check could not be made.
    """
    from moe_train.data.chat.conversation_to_tokens import check_effort_option, load_template
    from moe_train.data.check.check import check_data
    from moe_train.data.check.findings import PersonalDataSearch
    from moe_train.data.check.settings import CheckSettings
    from moe_train.data.check.sources import CheckedSource

    config = None if config_path is None else read_config(config_path)
    reading = ReadingOptions(layout, columns or [], ignore or [], reasoning_effort)
    sources, evaluation = sources_to_check(files, reading, config_path, config)
    # Stated files replace the evaluation set of the config.
    if against:
        evaluation = (CheckedSource(tuple(against), ignore=tuple(ignore or ())),)
    if config is not None:
        refuse_options({"--chat-date": chat_date is not None, "--reasoning-effort": reasoning_effort is not None}, STATED_BY_CONFIG)
    loaded = load_tokenizer(tokenizer, config, longest_stretch)
    if config and config.data:
        chat_template = chat_template or config.data.chat_template
    template = dated_template(load_template(chat_template, loaded), chat_date, config)
    check_effort_option(reasoning_effort, template, loaded)
    if not pii:
        refuse_options({"--phone-region": phone_region is not None}, "it goes with --pii")
    settings = CheckSettings(
        template=template,
        reasoning_effort=reasoning_effort,
        allowed=frozenset(allow or ()),
        seq_len=seq_len or (config.train.seq_len if config else None),
        batch_size=batch_size or (config.train.batch_size if config else None),
        against=evaluation,
        bench=bench,
        fix=fix,
        dry_run=dry_run,
        sample=sample,
        personal_data=PersonalDataSearch(phone_region) if pii else None,
        # The cores that this process may use, which in a container can be fewer than the machine has.
        num_proc=num_proc or cpu_cores(),
        num_listed=show,
    )
    with progress_line("checking"):
        result = check_data(sources, loaded, settings, _report_bytes)
    if as_json:
        print_json(result)
    else:
        from moe_train.data.check.report import print_report

        print_report(result, stdout_console())
    raise typer.Exit(1 if result["problem_counts"] else 0)


def _report_bytes(done: int, total: int, records: int) -> None:
    """Report how much of the files a check has read."""
    progress.report(progress.Progress("", done, total, "bytes", f"{records:,} records"))


@data_commands.command(
    "show",
    epilog=help_examples(
        "moe-train data show runs/quickstart/text/chat_train.jsonl --tokenizer runs/quickstart/tokenizer",
        "moe-train data show configs/quickstart_lora.yaml -n 16 --step 5 --html step_5.html",
    ),
)
def show_command(
    file: Annotated[str, typer.Argument(metavar="FILE_OR_CONFIG", help="File of records, or the config (.yaml) of a run.")],
    count: Annotated[int, typer.Option("-n", min=1, help="Number of records of a file, or of rows of a run's training step.")] = 3,
    tokenizer: TokenizerPath = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write an HTML page instead.")] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a picture of what would be printed instead.")] = None,
    positions: Annotated[bool, typer.Option("--positions", help="Show the position and id of each token.")] = False,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Pack the records of a file into rows of this many tokens.")] = None,
    step: Annotated[int | None, typer.Option(min=1, help="Training step of a run to show. Default: 1.")] = None,
    layout: RecordFormat = "auto",
    columns: ColumnMap = None,
    ignore: Ignore = None,
    chat_template: ChatTemplate = None,
    chat_date: ChatDate = None,
    reasoning_effort: ReasoningEffort = None,
    longest_stretch: LongestStretch = None,
    as_json: AsJson = False,
) -> None:
    """Show rows as training sees them: which tokens are trained on (green), segments and positions."""
    from moe_train.commands import show
    from moe_train.commands.show_page import write_page
    from moe_train.commands.show_picture import write_picture
    from moe_train.data.chat.conversation_to_tokens import check_effort_option, load_template

    if html is not None:
        refuse_options({"--json": as_json, "--svg": svg is not None}, "--html writes a page")
    if svg is not None:
        refuse_options({"--json": as_json}, "--svg writes a picture")
    config = read_config(Path(file)) if file.endswith((".yaml", ".yml")) else None
    loaded = load_tokenizer(tokenizer, config, longest_stretch)
    if config is None:
        refuse_options({"--step": step is not None}, f"{file} is not the config of a run (.yaml)")
        source = source_of_file(file, ReadingOptions(layout, columns or [], ignore or [], reasoning_effort))
        if source.record.name in ("preference", "labelled"):
            refuse_options(
                {"--html": html is not None, "--svg": svg is not None, "--seq-len": seq_len is not None},
                "pairs are printed as text, without tokens",
            )
            return _print_pairs(source, count, as_json)
        template = dated_template(load_template(chat_template, loaded), chat_date, None)
        check_effort_option(reasoning_effort, template, loaded)
        rows = show.rows_of_records(source, count, loaded, template, seq_len)
    else:
        refuse_options(
            {
                "--seq-len": seq_len is not None,
                "--format": layout != "auto",
                "--map": bool(columns),
                "--ignore": bool(ignore),
                "--chat-template": chat_template is not None,
                "--chat-date": chat_date is not None,
                "--reasoning-effort": reasoning_effort is not None,
            },
            "the rows of a run are those that its config describes",
        )
        rows = show.rows_of_run(config, count, loaded, step or 1)
    if html is not None:
        write_page(html, rows, loaded, file, positions)
        print(f"{html}: {show.summary(rows)}")
    elif svg is not None:
        write_picture(svg, rows, loaded, file, positions)
        print(f"{svg}: {show.summary(rows)}")
    elif as_json:
        print_json(show.segments_to_json(rows, loaded))
    else:
        show.print_rows(rows, loaded, stdout_console(), positions)


def _print_pairs(source: FileSource, count: int, as_json: bool) -> None:
    """Print preference pairs side by side."""
    from moe_train.commands import show_pairs

    pairs = show_pairs.pairs_of(source, count)
    if as_json:
        print_json([pair.as_json() for pair in pairs])
    else:
        show_pairs.print_pairs(pairs, stdout_console())


@data_commands.command(
    "prepare",
    epilog=help_examples(
        "moe-train data prepare configs/quickstart_pretrain.yaml",
        "moe-train data prepare configs/quickstart_pretrain.yaml data.num_proc=2 --to prepared_sets",
        "moe-train data prepare student.yaml --teacher big_model --top-k 64",
    ),
)
def prepare_command(
    config_path: ConfigPath,
    overrides: Overrides = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="DIR_OR_URL", help="Directory or bucket that receives a copy of the prepared sets."),
    ] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Also store log-probabilities of init_from, for full training on preferences.")
    ] = False,
    features: Annotated[
        bool, typer.Option("--features", help="Also store what a frozen tower computes of pictures or sound (vision.features).")
    ] = False,
    teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_OR_MODEL_DIR", help="Teacher whose log-probabilities are stored with the sets.", rich_help_panel=_TEACHER
        ),
    ] = None,
    teacher_file: Annotated[
        list[Path] | None,
        typer.Option(help="File of a served teacher's prompt_logprobs (vLLM), one for each source.", rich_help_panel=_TEACHER),
    ] = None,
    teacher_column: Annotated[
        str | None,
        typer.Option(
            help="Column of the records with a teacher's log-probabilities (axolotl: logprobs).", rich_help_panel=_TEACHER
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens to store at each position. Default: objective.top_k.", rich_help_panel=_TEACHER),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tokenize the data of CONFIG in advance, with data.num_proc processes.

    With a teacher, its most likely tokens at each position are stored, too; name the sets that are printed in data.train and
    data.eval of the student.

    If it is interrupted, the same command continues where it stopped.
    """
    if sum(map(bool, (teacher, teacher_file, teacher_column))) > 1:
        raise typer.BadParameter("--teacher, --teacher-file and --teacher-column name different teachers; state one of them")
    if top_k is not None and not (teacher or teacher_file or teacher_column):
        raise typer.BadParameter("--top-k has no effect without a teacher; state --teacher")
    config = read_config(config_path, overrides)
    from moe_train.commands.prepare import TeacherOptions, prepare

    options = None
    if teacher or teacher_file or teacher_column:
        options = TeacherOptions(teacher, tuple(teacher_file or ()), teacher_column, top_k)
    with progress_line("preparing"):
        answer = prepare(config, to, options, reference, features)
    if as_json:
        print_json(answer)
    else:
        print_table(answer.pop("sets"))
        print_mapping(answer)


@data_commands.command(
    "trace",
    epilog=help_examples("moe-train data trace configs/quickstart_lora.yaml --step 20 --row 0"),
)
def trace_command(
    config_path: ConfigPath,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(help="Training step, counted from 1.")] = 1,
    row: Annotated[int | None, typer.Option(help="Row of the step, counted from 0. Default: all rows.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the file and line of every record that a training step of CONFIG learns from."""
    config = read_config(config_path, overrides)
    from moe_train.commands.prepare import trace

    with progress_line("looking up records"):
        segments = trace(config, step, row)
    if as_json:
        print_json(segments)
    else:
        print_table(segments)
