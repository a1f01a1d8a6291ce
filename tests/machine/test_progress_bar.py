"""What the bar draws on a terminal, and that it draws nothing where output is piped."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from moe_train.machine.progress import Progress
from moe_train.machine.progress_bar import ProgressBar


def drawn(reports: list[Progress], terminal: bool = True) -> str:
    """The lines that the bar leaves behind."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120, color_system=None)
    with ProgressBar("checking", console, keep=True) as bar:
        for now in reports:
            bar.show(now)
    return file.getvalue()


@pytest.mark.parametrize(
    ("now", "parts"),
    [
        (Progress("", 2_000_000, 8_000_000, "bytes", "41 records"), ["checking ", "2.0/8.0 MB 41 records"]),
        (Progress("data.train.0", 3, 4_000, "shards", "[1]"), ["checking: data.train.0 ", "3/4,000 shards [1]"]),
    ],
)
def test_a_terminal_gets_what_and_how_much(now: Progress, parts: list[str]) -> None:
    last = drawn([now]).split("\r")[-1]
    assert all(part in last for part in parts)


def test_other_work_begins_the_line_anew() -> None:
    last = drawn([Progress("reading", 9, 9), Progress("writing", 0, 5)]).split("\r")[-1]
    assert "checking: writing" in last and "reading" not in last


def test_nothing_is_drawn_in_a_pipe() -> None:
    assert drawn([Progress("", 1, 2)], terminal=False).strip() == ""
