"""What a command prints: progress while a person waits, then tables for people or JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moe_train.machine.progress import listening

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show one line on a terminal's stderr while a command works: a bar with the time left where the work reports how far it
    is (`machine.progress`), otherwise a spinner."""
    from rich.console import Console

    from moe_train.machine.progress_bar import ProgressBar

    with ProgressBar(what, Console(stderr=True)) as bar, listening(bar.show):
        yield


def print_json(answer: Any) -> None:
    print(json.dumps(answer, indent=2, ensure_ascii=False))


def print_answers(answers: Mapping[str, Any], as_json: bool = False) -> None:
    if as_json:
        print_json(answers)
    else:
        print_table([{"": key.replace("_", " "), " ": _text(value, key)} for key, value in answers.items()])


def console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)


def print_checks(checks: Sequence[Mapping[str, Any]]) -> None:
    marks = {True: "ok", False: "FAILED", None: "not checked"}
    print_table(
        [
            {
                "check": check["name"],
                "result": marks[check["passed"]],
                "what": check["said"],
                "tolerance": str(check["figures"].get("tolerance", "")),
                "seconds": round(check["seconds"], 2),
            }
            for check in checks
        ]
    )


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=any(key.strip() for key in rows[0]))
    for key, value in rows[0].items():
        table.add_column(key.replace("_", " "), justify="right" if isinstance(value, int | float) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_text(value, str(key)) for key, value in row.items()))
    console().print(table, markup=False)


def _text(value: Any, key: str = "") -> str:
    if key.startswith("bytes") and isinstance(value, int):
        return f"{value / 2**20:,.2f} MiB"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
