"""Options that the commands `moe-train data check` and `show` share, and what they select: tokenizer, template and records."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

if TYPE_CHECKING:
    from moe_train.config import Config, FileSource
    from moe_train.data.check.sources import CheckedSource
    from moe_train.data.tokenizers.tokenizer import Tokenizer

RecordLayout = Literal["auto", "text", "json", "csv", "tsv", "parquet", "arrow"]
TokenizerPath = Annotated[
    Path | None, typer.Option(help="Directory with tokenizer.json, or a tekken.json or tokenizer.model.v*. Default: the run's own.")
]
RecordFormat = Annotated[RecordLayout, typer.Option("--format", help="Format of the files; auto decides by their names.")]
ColumnMap = Annotated[
    list[str] | None,
    typer.Option("--map", metavar="FIELD=COLUMN", help="Column of a field: text=, messages=, or prompt= and completion=."),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY", help="Key of records that is deliberately not read; may be repeated."),
]
ChatDate = Annotated[
    str | None, typer.Option(metavar="YYYY-MM-DD", help="Date that a chat template reads, for FILES. Default: today.")
]
ReasoningEffort = Annotated[
    str | None,
    typer.Option(metavar="EFFORT", help="Reasoning effort of conversations in FILES that state none, such as none or high."),
]
LongestStretch = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Most characters to encode at once; longer texts are split between words."),
]


STATED_BY_CONFIG = "the config states it (data.chat_date, and reasoning_effort of record)"


def dated_template(template: str | None, chat_date: str | None, config: Config | None) -> str | None:
    """Return a chat template as of a stated date, or else as of that of the run's data."""
    from moe_train.data.chat.chat_date import date_of_data, dated, reads_date

    if chat_date is not None:
        try:
            datetime.date.fromisoformat(chat_date)
        except ValueError:
            raise ValueError(f"--chat-date {chat_date} is no date; write it as 2026-11-30") from None
        refuse_options({"--chat-date": template is None or not reads_date(template)}, "the chat template reads no date")
    if template is None:
        return None
    return dated(template, chat_date or date_of_data(config.data if config else None))


def load_tokenizer(stated: Path | None, config: Config | None, longest_stretch: int | None) -> Tokenizer:
    """Load the stated tokenizer, or the one that a run trains with: from its data section, or else from its initial model."""
    from moe_train.data.tokenizers import load

    section = load.tokenizer_at(stated) if stated is not None else None
    if section is None and config and config.data:
        section = config.data.tokenizer
    if section is None and config and config.init_from:
        from moe_train.commands.prepare import find_model_tokenizer

        section = find_model_tokenizer(config.init_from)
    if section is None:
        raise ValueError("state --tokenizer, which determines the tokens and the chat format")
    if longest_stretch is not None:
        section = section.model_copy(update={"longest_stretch": longest_stretch})
    return load.load_tokenizer(section)


def refuse_options(stated: dict[str, bool], reason: str) -> None:
    """Raise ValueError if an option was stated that has no effect, rather than ignore it in silence."""
    options = [option for option, is_stated in stated.items() if is_stated]
    if options:
        raise ValueError(f"{' and '.join(options)} would have no effect: {reason}; leave it out")


class ReadingOptions(NamedTuple):
    """Options that say how to read the records of FILES."""

    layout: RecordLayout
    columns: list[str]
    """FIELD=COLUMN pairs."""
    ignore: list[str]
    reasoning_effort: str | None


def sources_to_check(
    files: list[str] | None, reading: ReadingOptions, config_path: Path | None, config: Config | None
) -> tuple[tuple[CheckedSource, ...], tuple[CheckedSource, ...]]:
    """Return the sources to check and those of the evaluation set, from the command line or from a run's data section."""
    from moe_train.config import with_targets
    from moe_train.data.check import sources

    # Either both are missing or both are stated.
    if (config is None) == (not files):
        raise ValueError("name either FILES, or with --config a run whose data.train is to be checked")
    ignored = tuple(reading.ignore)
    if config is None:
        section = sources.section_of(reading.columns, ignored, reading.reasoning_effort)
        return (sources.CheckedSource(tuple(files or ()), reading.layout, section, ignored),), ()
    stated = {"--format": reading.layout != "auto", "--map": bool(reading.columns)}
    refuse_options(stated, "the config states the format and columns of its files")
    if config.data is None:
        raise ValueError(f"{config_path} has no data section; add one, or name FILES instead of --config")
    data = with_targets(config.data, config.objective)
    return sources.sources_of(data.train, ignored), sources.sources_of(data.eval, ignored)


def source_of_file(file: str, reading: ReadingOptions) -> FileSource:
    """Return the source section for one file, with the record section that `--map` describes or that its first record fits."""
    from moe_train import config as sections
    from moe_train.commands import show
    from moe_train.data.check import sources

    record = sources.section_of(reading.columns, reading.ignore, reading.reasoning_effort)
    record = record or show.record_of([file], reading.layout, reading.ignore)
    if reading.reasoning_effort is not None:
        is_text = not isinstance(record, sections.ConversationRecord)
        refuse_options({"--reasoning-effort": is_text}, f"the records of {file} are no conversations")
        record = record.model_copy(update={"reasoning_effort": reading.reasoning_effort})
    return sections.FileSource(name="files", files=(file,), format=reading.layout, record=record)
