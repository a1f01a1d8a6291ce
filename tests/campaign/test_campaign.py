"""A part of the campaign of faults (`python -m tests.campaign --kills 200` is all of it), and its ledger."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaign.__main__ import all_trials, run_campaign
from tests.campaign.ledger import Ledger, Result


@pytest.mark.slow
def test_faults_are_survived(tmp_path: Path) -> None:
    """30 kills, and one trial of each other kind."""
    ledger = run_campaign(tmp_path, all_trials(30, per_kind=1))
    print(ledger.table())
    assert not ledger.lost()


def test_trials_have_names_of_their_own() -> None:
    names = [(trial.kind, trial.name) for trial in all_trials(200)]
    assert len(names) == len(set(names)) > 150
    assert sum(trial.faults for trial in all_trials(200) if trial.kind.startswith("SIGKILL at")) == 200
    assert len(list(all_trials(30, per_kind=1))) < 50


def test_a_ledger_continues_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Ledger(path).add(Result("kills", "run 0", 6, 6, 1.0, ""))
    Ledger(path).add(Result("kills", "run 1", 4, 0, 1.0, "LOST: other losses"))
    ledger = Ledger(path)
    assert ledger.has("kills", "run 0") and not ledger.has("kills", "run 2")
    assert ledger.table().splitlines()[2:] == ["| kills | 10 | 6 | 4 |", "| all | 10 | 6 | 4 |"]
    assert [result.name for result in ledger.lost()] == ["run 1"]
    ledger.forget_lost()
    assert [result.name for result in Ledger(path).results] == ["run 0"]
