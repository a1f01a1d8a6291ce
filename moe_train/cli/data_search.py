"""The commands `moe-train data find` and `erase`: what holds a record, and the data without it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_train.cli.arguments import AsJson, OutDir, help_examples
from moe_train.cli.terminal import print_json, print_table, progress_line
from moe_train.machine.program import runnable

if TYPE_CHECKING:
    from moe_train.commands.find_records import Found

search_commands = typer.Typer()

Pattern = Annotated[str | None, typer.Argument(metavar="PATTERN", help="Text that the record contains, in any case.")]
RecordHash = Annotated[
    str | None, typer.Option("--hash", metavar="SHA256", help="Hash of the record, as find prints it, or of one of its texts.")
]
IsRegex = Annotated[bool, typer.Option("--regex", help="PATTERN is a regular expression.")]
Directories = Annotated[
    list[Path] | None, typer.Option("--in", metavar="DIR", help="Run, or folder of runs; may be repeated. Default: runs.")
]
_STEPS_SHOWN = 8


@search_commands.command(
    "find",
    epilog=help_examples(
        "moe-train data find 'json.dumps' --in runs/quickstart",
        "moe-train data find --regex '[\\w.]+@example\\.com' --in runs --json",
    ),
)
def find_command(
    pattern: Pattern = None,
    sha256: RecordHash = None,
    is_regex: IsRegex = False,
    directories: Directories = None,
    as_json: AsJson = False,
) -> None:
    """Print which sets, training steps, checkpoints, exports and later runs hold a record: the inverse of `data trace`.

    Raw files are read; where one is gone or has changed, the tokens that were made from it. Exit code: 1 if nothing was found.
    """
    from moe_train.commands.find_records import find_records
    from moe_train.data.records.search import wanted

    looked_for = wanted(pattern, sha256, is_regex)
    with progress_line("searching"):
        found = find_records(looked_for, directories or [Path("runs")])
    if as_json:
        print_json(found.to_json())
    else:
        _print_found(found)
    if not found.runs:
        raise typer.Exit(1)


def _print_found(found: Found) -> None:
    """Print a table of records, then what of each run holds them."""
    rows = []
    for run in found.runs:
        for searched in run.sets:
            for record in searched.records:
                rows.append(
                    {"run": str(run.run_dir), "set": searched.sha256[:16], "record": record.location, "sha256": record.sha256}
                )
        for record in run.held_out:
            rows.append({"run": str(run.run_dir), "set": "data.eval", "record": record.location, "sha256": record.sha256})
    if rows:
        print_table(rows)
    for run in found.runs:
        if run.is_trained_on:
            steps = run.why_unknown or _in_words([str(step) for step in run.steps or ()])
            print(f"{run.run_dir}: steps {steps or 'none yet'}")
            print(f"  checkpoints {_in_words([str(step) for step in run.checkpoints]) or 'none'}")
            for entry in run.exports:
                print(f"  export {entry.directory} (step {entry.step}, {entry.layout})")
    for later in found.later_runs:
        print(f"{later.run_dir}: started from {later.started_from}")
        for entry in later.exports:
            print(f"  export {entry.directory} (step {entry.step}, {entry.layout})")
    for reason in found.not_searched:
        print(f"could not be searched: {reason}")
    print(f"{len(rows)} records in {len(found.runs)} of {len(found.searched)} runs")


def _in_words(items: list[str]) -> str:
    """Return the first items, and how many there are if they are many."""
    if len(items) <= _STEPS_SHOWN:
        return ", ".join(items)
    return f"{', '.join(items[:_STEPS_SHOWN])}, … ({len(items)} in all)"


@search_commands.command(
    "erase",
    epilog=help_examples(
        "moe-train data erase data_without_it 'json.dumps' --in runs/quickstart",
        "moe-train data erase data_without_it --hash 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    ),
)
def erase_command(
    out_dir: OutDir,
    pattern: Pattern = None,
    sha256: RecordHash = None,
    is_regex: IsRegex = False,
    directories: Directories = None,
    as_json: AsJson = False,
) -> None:
    """Write the data files of runs without a record, and print which sets, checkpoints, exports and runs still hold it.

    Nothing is deleted: the list says what to delete, and how to train again.
    """
    from moe_train.commands.erase_records import erase_records
    from moe_train.data.records.search import wanted

    looked_for = wanted(pattern, sha256, is_regex)
    with progress_line("erasing"):
        answer = erase_records(looked_for, directories or [Path("runs")], out_dir)
    if as_json:
        print_json(answer)
        return
    print(f"{out_dir}: {len(answer['files'])} files without {len(answer['erased'])} records: {', '.join(answer['erased'][:3])}")
    for line in answer["what_to_do"]:
        print(runnable(f"- {line}"))
