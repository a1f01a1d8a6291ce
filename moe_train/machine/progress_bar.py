"""The progress bar of all commands: one line on a terminal, with the time left; nothing if output is piped."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from moe_train.machine import progress


class ProgressBar:
    """A progress line on a terminal, updated by `show`; it spins until the first report gives the total.

    Args:
        title: what the command does, shown before the text of each report.
        console: where the line is drawn, if it is a terminal.
        keep: whether to leave the line on the terminal at the end.
    """

    def __init__(self, title: str, console: Console, keep: bool = False):
        columns = (
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            TextColumn("{task.fields[amount]}", markup=False),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeRemainingColumn(elapsed_when_finished=keep),
        )
        self._title = title
        self._bar = Progress(*columns, console=console, transient=not keep, disable=not console.is_terminal)
        self._task = self._bar.add_task(f"{title} …", total=None, amount="", detail="")
        self._shown: progress.Progress | None = None

    def show(self, now: progress.Progress) -> None:
        """Draw the progress of some work. A report of other work, or of a smaller amount, restarts the line."""
        previous = self._shown
        self._shown = now
        # A reset starts the clock anew; otherwise the time left would be estimated from the speed of other work.
        if previous is None or previous.what != now.what or previous.done > now.done:
            description = f"{self._title}: {now.what}" if now.what else self._title
            self._bar.reset(self._task, total=now.total, completed=now.done, description=description)
        self._bar.update(self._task, total=now.total, completed=now.done, amount=_amount(now), detail=now.detail)

    def start(self) -> None:
        """Start drawing."""
        self._bar.start()

    def stop(self) -> None:
        """Stop drawing, and leave or remove the line."""
        self._bar.stop()

    def __enter__(self) -> ProgressBar:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _amount(now: progress.Progress) -> str:
    if now.unit == "bytes":
        return f"{now.done / 1e6:,.1f}/{now.total / 1e6:,.1f} MB"
    return f"{now.done:,}/{now.total:,} {now.unit}" if now.unit else ""
