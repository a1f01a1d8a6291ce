"""Goodput: which share of its wall time a run has spent on steps that count, and what took the rest.

The measurements of all processes that worked on a run, one after the other, are kept in `goodput.json` in the run's folder. The
file is replaced at most every few seconds, so what a killed process did since is counted as time between processes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from moe_train.machine.files import JsonObject, read_object, write_text

log = logging.getLogger(__name__)

GOODPUT_FILE = "goodput.json"
"""Name of the file in the folder of a run."""
WRITE_SECONDS = 15.0
"""Least number of seconds between two updates of the file."""

Activity = Literal["start", "compile", "input", "steps", "evaluation", "checkpoint"]
"""What a process may be doing: opening data and weights and testing kernels; compiling the step; waiting for a batch while the
device is idle; taking steps; measuring the held-out loss or answering suites; waiting for a checkpoint to be handed over.
"""
ACTIVITIES: tuple[Activity, ...] = get_args(Activity)
SHARES = ("productive", "restart", *(activity for activity in ACTIVITIES if activity != "steps"))
"""Shares of the wall time; they add up to 1."""


class Session(NamedTuple):
    """What one process has measured; times are seconds since 1970."""

    began: float
    updated: float
    first_step: int
    """The step that the process continued after."""
    step: int
    """The last step that it has taken."""
    seconds: dict[Activity, float]
    end: str | None = None
    """`finished`, or why it stopped; None while it works, and for a process that was killed."""

    def to_json(self) -> JsonObject:
        """Return the session, ready for JSON."""
        return self._asdict()


class Summary(NamedTuple):
    """Where the wall time of a run went, over all its processes."""

    seconds: float
    """Wall time from the first start, without pauses after the run was finished."""
    shares: dict[str, float]
    """The shares in SHARES; `productive` are steps that were not done again later, `restart` is the time between two processes,
    steps that were done again, and the starts of all processes but the first.
    """
    sessions: int

    def in_words(self) -> str:
        """Return the summary as a line for people, with the shares of at least 0.1%."""
        parts = []
        for name, share in self.shares.items():
            if name != "productive" and share >= 0.001:
                parts.append(f"{name} {share:.1%}")
        others = f" ({', '.join(parts)})" if parts else ""
        starts = f" and {self.sessions} starts" if self.sessions > 1 else ""
        return f"goodput: {self.shares['productive']:.1%} of {_duration(self.seconds)}{starts} went into steps that count{others}"


def summarize_sessions(sessions: Sequence[Session]) -> Summary:
    """Sum the time of the processes of a run; no sessions have no time."""
    totals = dict.fromkeys(SHARES, 0.0)
    for number, session in enumerate(sessions):
        for activity, seconds in session.seconds.items():
            name = "productive" if activity == "steps" else activity
            totals["restart" if number and name == "start" else name] += seconds
        if number + 1 < len(sessions):
            following = sessions[number + 1]
            redone = _seconds_done_again(session, following)
            totals["productive"] -= redone
            totals["restart"] += redone
            if session.end != "finished":
                totals["restart"] += max(0.0, following.began - session.updated)
    wall = sum(totals.values())
    return Summary(wall, {name: seconds / wall if wall else 0.0 for name, seconds in totals.items()}, len(sessions))


def _seconds_done_again(session: Session, following: Session) -> float:
    """Return the time of the steps of a session that the following one does again."""
    steps = session.step - session.first_step
    redone = min(steps, max(0, session.step - following.first_step))
    return session.seconds.get("steps", 0.0) * redone / steps if steps else 0.0


def read_sessions(run_dir: Path) -> list[Session]:
    """Return the sessions of a run; none if it has no `goodput.json`.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    path = run_dir / GOODPUT_FILE
    if not path.exists():
        return []
    try:
        return [_session_of(entry) for entry in read_object(path)["sessions"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: it does not state the sessions of a run; remove it") from error


def _session_of(entry: JsonObject) -> Session:
    session = Session(**entry)
    numbers = (session.began, session.updated, session.first_step, session.step, *session.seconds.values())
    if not all(isinstance(number, int | float) for number in numbers) or not session.seconds.keys() <= set(ACTIVITIES):
        raise TypeError
    return session


def _kept_sessions(run_dir: Path, write: bool) -> list[Session]:
    """Return the sessions so far; those of a damaged file do not count."""
    try:
        return read_sessions(run_dir)
    except ValueError as error:
        if write:
            renamed = run_dir / f"damaged-{GOODPUT_FILE}"
            os.replace(run_dir / GOODPUT_FILE, renamed)
            log.warning("%s; it was renamed to %s, and goodput counts from now on", error, renamed.name)
        return []


class Goodput:
    """Stopwatch of one process: at each moment it does exactly one activity.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._began = clock()
        self._since = self._began
        self._activity: Activity = "start"
        self._seconds: dict[Activity, float] = dict.fromkeys(ACTIVITIES, 0.0)
        self._first_step = 0
        self._earlier: list[Session] = []
        self._path: Path | None = None
        self._written = -WRITE_SECONDS
        self.step = 0
        """The last step that was taken."""

    def open(self, run_dir: Path, first_step: int, write: bool) -> None:
        """Read the sessions before this one, and begin to write.

        Args:
            run_dir: the folder of the run.
            first_step: the step that this process continues after; after 0, what earlier processes did does not count.
            write: whether this process writes the file. It renames a damaged one, with a warning.
        """
        if first_step:
            self._earlier = _kept_sessions(run_dir, write)
        self._first_step = self.step = first_step
        if write:
            self._path = run_dir / GOODPUT_FILE
        self.write()

    def switch(self, activity: Activity) -> Activity:
        """Begin an activity, and return the one before."""
        now = self._clock()
        self._seconds[self._activity] += max(0.0, now - self._since)
        self._since = now
        before = self._activity
        self._activity = activity
        return before

    @contextlib.contextmanager
    def during(self, activity: Activity) -> Iterator[None]:
        """Count the time of the block as `activity`, then continue with the activity before."""
        before = self.switch(activity)
        try:
            yield
        finally:
            self.switch(before)

    def move(self, seconds: float, activity: Activity) -> None:
        """Count time of the current activity, which has just passed, as another one."""
        self._seconds[self._activity] -= seconds
        self._seconds[activity] += seconds

    def summary(self) -> Summary:
        """Return the shares of the run so far, earlier processes included."""
        return summarize_sessions([*self._earlier, self._session()])

    def write(self, end: str | None = None) -> None:
        """Replace the file, unless that was done a moment ago. A disk that is full is a warning, and the run goes on.

        Args:
            end: why the process stops; then the file is always written.
        """
        if self._path is None or (end is None and self._clock() - self._written < WRITE_SECONDS):
            return
        self._written = self._clock()
        sessions = [*self._earlier, self._session(end)]
        try:
            write_text(self._path, json.dumps({"sessions": [session.to_json() for session in sessions]}, indent=1) + "\n")
        except OSError as error:
            log.warning("%s could not be written: %s", self._path, error.strerror)

    def _session(self, end: str | None = None) -> Session:
        self.switch(self._activity)
        return Session(self._began, self._since, self._first_step, self.step, dict(self._seconds), end)


def _duration(seconds: float) -> str:
    """Format seconds as "95 s", "12 min" or "3.4 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
