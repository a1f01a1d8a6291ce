"""Run a campaign of faults: `python -m tests.campaign [--kills 30] [--seed 0] [--state FOLDER] [--only WORD] [--minutes M]`.

Every trial disturbs a run (kills it, damages its files, fills its disk …), starts it again, and compares its final weights,
moments and losses bit for bit with a run that nobody disturbed. A campaign that is stopped continues where it was with the same
command; the table of what was tried, survived and lost is printed at the end.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.campaign import damage, disks, jobs, kills, outputs, signals
from tests.campaign.ledger import Ledger, Result
from tests.campaign.trial_run import ROOT, Lost, Workplace


class Trial(NamedTuple):
    """A trial, and how many faults it tries."""

    kind: str
    name: str
    faults: int
    run: Callable[[Workplace, random.Random], str]


def all_trials(num_kills: int, per_kind: int | None = None) -> Iterator[Trial]:
    """Yield the trials of a campaign: one of each kind in turn, so that a campaign that is stopped has tried all kinds.

    Args:
        num_kills: number of SIGKILLs.
        per_kind: number of trials of each other kind; None for all.
    """
    by_kind: dict[str, list[Trial]] = {}
    for module in (signals, jobs, disks, outputs, damage):
        for kind, name, run in module.trials():
            by_kind.setdefault(kind, []).append(Trial(kind, name, 1, run))
    for kind, trials in by_kind.items():
        by_kind[kind] = trials[:per_kind]
    for name, count in kills.trials(num_kills):
        by_kind.setdefault(kills.KIND, []).append(Trial(kills.KIND, name, count, partial(kills.kill_and_resume, count)))
    for turn in itertools.zip_longest(*by_kind.values()):
        yield from (trial for trial in turn if trial is not None)


def run_campaign(
    folder: Path, trials: Iterable[Trial], seed: int = 0, only: str = "", seconds: float = float("inf"), retry: bool = False
) -> Ledger:
    """Run the trials that were not made before, until the time is over.

    Args:
        folder: state and data of the campaign.
        trials: what to try.
        seed: decides the moments and bytes; each trial draws its own numbers, whatever was tried before it.
        only: a word that the kinds or names of the trials to run must contain.
        seconds: no trial is started after this time.
        retry: whether trials that were not survived are made again.
    """
    workplace = Workplace(folder)
    ledger = Ledger(folder / f"results-{seed}.jsonl")
    if retry:
        ledger.forget_lost()
    start = time.monotonic()
    for trial in trials:
        if only not in f"{trial.kind} {trial.name}" or ledger.has(trial.kind, trial.name):
            continue
        if time.monotonic() - start > seconds:
            break
        began = time.monotonic()
        survived = trial.faults
        try:
            detail = trial.run(workplace, random.Random(f"{seed} {trial.kind} {trial.name}"))
        except Lost as lost:
            survived = 0
            detail = f"LOST: {lost}"
        elapsed = time.monotonic() - began
        ledger.add(Result(trial.kind, trial.name, trial.faults, survived, round(elapsed, 1), detail))
        print(f"{trial.kind}: {trial.name}: {survived} of {trial.faults} in {elapsed:.0f} s; {detail}", flush=True)
    return ledger


def main() -> None:
    """Read the arguments, run the campaign and print its table."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="number of SIGKILLs (default 30)")
    parser.add_argument("--per-kind", type=int, help="number of trials of each other kind (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=ROOT / ".cache" / "campaign", help="folder to keep and continue from")
    parser.add_argument("--only", default="", help="run only trials whose kind or name contains this")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no trial after this time")
    parser.add_argument("--retry", action="store_true", help="try again what was not survived before")
    arguments = parser.parse_args()
    trials = all_trials(arguments.kills, arguments.per_kind)
    ledger = run_campaign(arguments.state, trials, arguments.seed, arguments.only, 60 * arguments.minutes, arguments.retry)
    print(ledger.table())
    for result in ledger.lost():
        print(f"{result.kind}: {result.name}: {result.detail}")


if __name__ == "__main__":
    main()
