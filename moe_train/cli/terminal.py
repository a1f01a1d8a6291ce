"""Output of the commands: a progress line while the work lasts, then tables for people or JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moe_train.machine.program import runnable
from moe_train.machine.progress import listening

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 200
"""Width of tables, in characters, if stdout is not a terminal."""


@contextmanager
def progress_line(title: str) -> Iterator[None]:
    """Show one line on a terminal's stderr while the block runs.

    The line is a bar with the time left if the work reports its progress (`machine.progress`), otherwise a spinner. Nothing is
    shown if stderr is not a terminal.
    """
    from rich.console import Console

    from moe_train.machine.progress_bar import ProgressBar

    with ProgressBar(title, Console(stderr=True)) as bar, listening(bar.show):
        yield


def stdout_console() -> Console:
    """Return a console for stdout: as wide as the terminal, or `PIPE_WIDTH` characters."""
    from rich.console import Console

    # Without a terminal, Rich would assume 80 characters and fold the tables of a log.
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_mapping(values: Mapping[str, Any], as_json: bool = False) -> None:
    """Print a mapping as a table of two columns without a header, or as JSON."""
    if as_json:
        print_json(values)
        return
    rows = []
    for key, value in values.items():
        # The columns have blank names, for which `print_table` shows no header.
        rows.append({"": key.replace("_", " "), " ": _format(value, key)})
    print_table(rows)


def print_checks(checks: Sequence[Mapping[str, Any]]) -> None:
    """Print the checks of a proof, given as `Check._asdict()`, as a table with one row per check."""
    results = {True: "ok", False: "FAILED", None: "not checked"}
    rows = []
    for check in checks:
        row = {
            "check": check["name"],
            "result": results[check["passed"]],
            "what": check["said"],
            "tolerance": str(check["figures"].get("tolerance", "")),
            "seconds": round(check["seconds"], 2),
        }
        rows.append(row)
    print_table(rows)


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows with equal keys as a table; the keys are the header unless all of them are blank. No rows print nothing."""
    from rich.table import Table

    if not rows:
        return
    table = Table(box=None, show_header=any(key.strip() for key in rows[0]))
    for key, value in rows[0].items():
        is_number = isinstance(value, int | float)
        table.add_column(key.replace("_", " "), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_format(value, str(key)) for key, value in row.items()))
    # Values may contain square brackets, which are not Rich's markup.
    stdout_console().print(table, markup=False)


def _format(value: Any, key: str = "") -> str:
    """Format a value for people: numbers with separators, values of keys that begin with `bytes` in MiB."""
    if key.startswith("bytes") and isinstance(value, int):
        return f"{value / 2**20:,.2f} MiB"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    # bool is a subclass of int.
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return runnable(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
