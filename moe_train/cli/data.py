"""The commands `moe-train data …`: look at data before anything is trained on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moe_train.cli.arguments import AsJson, ConfigPath, Overrides, load_run
from moe_train.cli.terminal import console, print_answers, print_json, print_table, waiting
from moe_train.machine import progress

if TYPE_CHECKING:
    from moe_train.config import Config
    from moe_train.data.tokenizers.tokenizer import Tokenizer

app = typer.Typer(name="data", help="Look at data before anything is trained on it.", no_args_is_help=True)

TokenizerPath = Annotated[Path | None, typer.Option(help="A folder with tokenizer.json, a tekken.json or tokenizer.model.v*.")]
RecordFormat = Annotated[
    Literal["auto", "text", "json", "csv", "parquet", "arrow"],
    typer.Option("--format", help="Of the files; auto goes by names."),
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--map", metavar="OURS=THEIRS", help="A column: text=, messages=, or prompt= and completion=."),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY", help="A key that is not to be read, though it changes the meaning; may be repeated."),
]
ChatTemplate = Annotated[str | None, typer.Option(help="A jinja file, where the tokenizer has none or another.")]


def _tokenizer(stated: Path | None, run: Config | None) -> Tokenizer:
    """The one that is stated, or that `run` trains with: its own, or that of the model it starts from."""
    from moe_train.data.tokenizers.load import load_tokenizer, tokenizer_at

    section = run.data.tokenizer if run and run.data else None
    if stated is None and section is None and run and run.init_from:
        stated = Path(run.init_from)
    if stated is not None:
        section = tokenizer_at(stated)
    if section is None:
        raise ValueError("state --tokenizer: tokens and chat format depend on it")
    return load_tokenizer(section)


@app.command("check")
def check_data(
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILES", help="JSON lines, JSON, CSV, Parquet, Arrow, text; packed or not; folders, globs."),
    ] = None,
    tokenizer: TokenizerPath = None,
    run: Annotated[Path | None, typer.Option("--config", help="A run, for its data, tokenizer, seq_len and batch_size.")] = None,
    layout: RecordFormat = "auto",
    columns: Columns = None,
    ignore: Ignore = None,
    chat_template: ChatTemplate = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Positions of a training row.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of an optimizer step.")] = None,
    against: Annotated[
        list[str] | None, typer.Option(metavar="EVAL_FILES", help="Files of the evaluation set; may be repeated.")
    ] = None,
    bench: Annotated[Path | None, typer.Option(metavar="FILE", help="What `bench --json` wrote: how long an epoch takes.")] = None,
    fix: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write a corrected copy, and what was changed, to this folder.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what --fix would change, and write nothing.")] = False,
    sample: Annotated[int | None, typer.Option(min=1, metavar="N", help="Read about N records from all over the files.")] = None,
    allow: Annotated[list[str] | None, typer.Option(metavar="RULE", help="A rule that may be broken; may be repeated.")] = None,
    show: Annotated[int, typer.Option(min=1, help="Problems to name for each rule; all are counted.")] = 10,
    num_proc: Annotated[int | None, typer.Option(min=1, help="Processes; one for each core where not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find what is wrong with records, and say what training on them will take.

    Exit code: 0 no problem, 1 problems found, 2 it could not be checked.
    """
    from moe_train.data.chat.conversation_to_tokens import load_template
    from moe_train.data.check import check as checks

    config = None if run is None else load_run(run)
    if (config is None) == (not files):
        raise ValueError("name files, or a run with --config, whose data.train is checked")
    chosen = config.data if config else None
    if config and not chosen:
        raise ValueError(f"{run} has no data section")
    loaded = _tokenizer(tokenizer, config)
    ignored = tuple(ignore or ())
    if chosen:
        sources = checks.sources_of(chosen.train, ignored)
        evaluation = checks.sources_of(chosen.eval, ignored)
    else:
        section = checks.section_of(columns or (), ignored)
        sources = (checks.CheckedSource(tuple(files or ()), layout, section, ignored),)
        evaluation = ()
    settings = checks.Settings(
        template=load_template(chat_template or (chosen.chat_template if chosen else None), loaded),
        allowed=frozenset(allow or ()),
        seq_len=seq_len or (config.train.seq_len if config else None),
        batch_size=batch_size or (config.train.batch_size if config else None),
        against=(checks.CheckedSource(tuple(against), ignore=ignored),) if against else evaluation,
        bench=bench,
        fix=fix,
        dry_run=dry_run,
        sample=sample,
        num_proc=num_proc or len(os.sched_getaffinity(0)),
        shown=show,
    )

    def report(done: int, total: int, records: int) -> None:
        progress.report(progress.Progress("", done, total, "bytes", f"{records:,} records"))

    with waiting("checking"):
        answer = checks.check_records(sources, loaded, settings, report)
    if as_json:
        print_json(answer)
    else:
        from moe_train.data.check.report import print_report

        print_report(answer, console())
    raise typer.Exit(1 if answer["problem_counts"] else 0)


@app.command("show")
def show_data(
    file: Annotated[str, typer.Argument(metavar="FILE_OR_CONFIG", help="A file of records, or a run's YAML with its data.")],
    count: Annotated[int, typer.Option("-n", min=1, help="Records of a file, or rows of a run's step.")] = 3,
    tokenizer: TokenizerPath = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page for a browser instead.")] = None,
    positions: Annotated[bool, typer.Option("--positions", help="With each token's position and id.")] = False,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Pack a file's records into rows of so many positions.")] = None,
    step: Annotated[int, typer.Option(min=1, help="The training step of a run.")] = 1,
    layout: RecordFormat = "auto",
    columns: Columns = None,
    ignore: Ignore = None,
    chat_template: ChatTemplate = None,
    as_json: AsJson = False,
) -> None:
    """Show records as training sees them: tokens, those that are learnt in green, segments, positions."""
    from moe_train import config as sections
    from moe_train.commands import show, show_pairs
    from moe_train.data.chat.conversation_to_tokens import load_template
    from moe_train.data.check import check

    run = load_run(Path(file)) if file.endswith((".yaml", ".yml")) else None
    loaded = _tokenizer(tokenizer, run)
    if run is not None:
        rows = show.rows_of_run(run, count, loaded, step)
    else:
        ignored = tuple(ignore or ())
        record = check.section_of(columns or (), ignored) or show.record_of([file], layout, ignored)
        source = sections.FileSource(name="files", files=(file,), format=layout, record=record)
        if isinstance(record, sections.PreferenceRecord | sections.LabelledRecord):
            pairs = show_pairs.pairs_of(source, count)
            if html is not None:
                raise ValueError("pairs are shown in a terminal or with --json; leave out --html")
            if as_json:
                print_json([pair.as_json() for pair in pairs])
            else:
                show_pairs.print_pairs(pairs, console())
            return
        rows = show.rows_of_records(source, count, loaded, load_template(chat_template, loaded), seq_len)
    if html is not None:
        show.write_page(html, rows, loaded, file, positions)
        print(f"{html}: {show.summary(rows)}")
    elif as_json:
        print_json(show.as_json(rows, loaded))
    else:
        show.print_rows(rows, loaded, console(), positions)


@app.command("prepare")
def prepare_data(
    config: ConfigPath,
    overrides: Overrides = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="DIR_OR_URL", help="Copy the prepared sets there, a bucket too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tokenise and pack what CONFIG trains on ahead, in data.num_proc processes; started again, goes on where it stopped."""
    resolved = load_run(config, overrides)
    from moe_train.commands.prepare import prepare

    with waiting("preparing"):
        answer = prepare(resolved, to)
    if as_json:
        print_json(answer)
    else:
        print_table(answer.pop("sets"))
        print_answers(answer)


@app.command("trace")
def trace_data(
    config: ConfigPath,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(help="The training step, from 1.")] = 1,
    row: Annotated[int | None, typer.Option(help="Of its rows, from 0; all where not stated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Name the file and line of every record that a training step of CONFIG learns from."""
    resolved = load_run(config, overrides)
    from moe_train.commands.prepare import trace

    with waiting("looking up"):
        segments = trace(resolved, step, row)
    if as_json:
        print_json(segments)
    else:
        print_table(segments)
