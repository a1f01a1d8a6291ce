"""Where the wall time of a run went, over processes that were killed, stopped or finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.run.goodput import SHARES, Goodput, Session, read_sessions, summarize_sessions


class Clock:
    """A clock that is moved by hand."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def work(clock: Clock, folder: Path, first_step: int, steps: int, end: str | None) -> Goodput:
    """10 s to start, 5 s to compile, 2 s a step of which half a second is input, 4 s of evaluation and 1 s of saving."""
    goodput = Goodput(clock)
    clock.now += 10
    goodput.open(folder, first_step, write=True)
    with goodput.during("compile"):
        clock.now += 5
    goodput.switch("steps")
    for step in range(first_step + 1, first_step + steps + 1):
        clock.now += 2
        goodput.move(0.5, "input")
        goodput.step = step
    with goodput.during("evaluation"):
        clock.now += 4
        with goodput.during("checkpoint"):
            clock.now += 1
    goodput.write(end)
    return goodput


def test_every_second_of_one_process_has_one_activity(tmp_path: Path) -> None:
    clock = Clock()
    summary = work(clock, tmp_path, 0, 10, "finished").summary()
    assert summary.seconds == 40 == clock.now - 1000
    seconds = {name: round(share * 40, 6) for name, share in summary.shares.items() if share}
    assert seconds == {"productive": 15, "start": 10, "compile": 5, "input": 5, "evaluation": 4, "checkpoint": 1}
    assert set(summary.shares) == set(SHARES) and sum(summary.shares.values()) == pytest.approx(1)
    assert summary.in_words().startswith("goodput: 37.5% of 40 s went into steps that count (start 25.0%, compile 12.5%, ")


def test_what_is_done_again_and_the_time_between_processes_are_no_progress(tmp_path: Path) -> None:
    clock = Clock()
    work(clock, tmp_path, 0, 10, "SIGTERM")
    clock.now += 60  # the next process continues after step 6: 4 steps of 1.5 s are done again
    summary = work(clock, tmp_path, 6, 10, "finished").summary()
    assert summary.sessions == 2 and summary.seconds == 40 + 60 + 40
    assert summary.shares["productive"] * 140 == pytest.approx(15 - 4 * 1.5 + 15)
    assert summary.shares["restart"] * 140 == pytest.approx(4 * 1.5 + 60 + 10)
    # A run that was finished and is made longer later has not waited.
    clock.now += 10_000
    assert work(clock, tmp_path, 16, 10, None).summary().seconds == 180


def test_a_killed_process_leaves_what_it_last_wrote(tmp_path: Path) -> None:
    clock = Clock()
    goodput = Goodput(clock)
    goodput.open(tmp_path, 0, write=True)
    goodput.switch("steps")
    for step in range(1, 31):
        clock.now += 1
        goodput.step = step
        goodput.write()
    [session] = read_sessions(tmp_path)
    assert session.end is None and session.step == 30 and session.seconds["steps"] == 30
    clock.now += 7
    goodput.write()  # too soon after the last time
    assert read_sessions(tmp_path) == [session]


def test_a_new_start_and_other_processes(tmp_path: Path) -> None:
    clock = Clock()
    work(clock, tmp_path, 0, 3, "finished")
    assert work(clock, tmp_path, 0, 3, "finished").summary().sessions == 1
    assert Goodput(clock).summary().seconds == 0 and summarize_sessions([]).shares["productive"] == 0
    other = tmp_path / "other"
    other.mkdir()
    Goodput(clock).open(other, 0, write=False)
    assert not list(other.iterdir())


@pytest.mark.parametrize("content", ["{}", "[]", '{"sessions": [{"began": 1}]}', '{"sessions": 3}', "not JSON"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str) -> None:
    (tmp_path / "goodput.json").write_text(content)
    with pytest.raises(ValueError, match=r"goodput\.json"):
        read_sessions(tmp_path)
    Goodput(Clock()).open(tmp_path, 5, write=True)
    assert "it was renamed to damaged-goodput.json" in caplog.text
    assert (tmp_path / "damaged-goodput.json").read_text() == content
    assert [session.first_step for session in read_sessions(tmp_path)] == [5]


def test_sessions_survive_json() -> None:
    session = Session(1.0, 2.0, 0, 3, {"steps": 1.0}, "finished")
    assert Session(**json.loads(json.dumps(session.to_json()))) == session
