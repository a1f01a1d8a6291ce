"""SIGKILL at random moments: while a run starts, between steps, and while it saves."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from tests.campaign.trial_run import SAVE_STEPS, STEPS, Lost, Process, Workplace, finish, last_step

KIND = "SIGKILL at a random moment (start, step, save)"
KILLS_PER_RUN = 6


def trials(kills: int) -> Iterator[tuple[str, int]]:
    """Yield (name, number of kills) for the runs that are killed several times each."""
    for index in range(0, kills, KILLS_PER_RUN):
        yield f"run {index // KILLS_PER_RUN}", min(KILLS_PER_RUN, kills - index)


def kill_and_resume(kills: int, workplace: Workplace, rng: random.Random) -> str:
    """Kill one run several times, let it end, and compare it with the undisturbed run.

    Returns:
        The moments of the kills, for the ledger.
    """
    run_dir = workplace.new_folder(f"kills-{rng.getrandbits(32)}")
    moments = []
    for number in range(kills):
        # The later kills have to find steps that are still to be done.
        moments.append(kill_once(workplace.start(run_dir), run_dir, rng, STEPS * (number + 1) // (kills + 1)))
    finish(workplace, run_dir, workplace.reference())
    shutil.rmtree(run_dir)
    return ", ".join(moments)


def kill_once(process: Process, run_dir: Path, rng: random.Random, furthest: int) -> str:
    """Kill a process at a random moment before a step; return the moment in words."""
    phase = rng.choice(("start", "step", "step", "save", "save", "save"))
    first = last_step(run_dir)
    aim = min(rng.randint(first + 1, max(first + 1, furthest)), STEPS - 1)
    match phase:
        case "start":
            aim = first
            process.wait_until(lambda: "parameters" in process.stderr(), rng.uniform(0.2, 8))
            time.sleep(rng.uniform(0, 1.5))
        case "step":
            process.wait_until(lambda: last_step(run_dir) >= aim)
            time.sleep(rng.uniform(0, 0.03))
        case "save":
            aim = -(-aim // SAVE_STEPS) * SAVE_STEPS
            process.wait_until(lambda: any((run_dir / "checkpoints").glob(f"{aim}*")) or last_step(run_dir) > aim)
            time.sleep(rng.uniform(0, 0.06))
    if not process.runs():
        ended = process.wait()
        if ended.code != 0:
            raise Lost(f"ended with {ended.code} before the kill: {ended.stderr[-300:]}")
        return f"{phase} (too late)"
    process.send(signal.SIGKILL)
    ended = process.wait()
    if "Traceback" in ended.stderr:
        raise Lost(f"a traceback before the kill: {ended.stderr[-300:]}")
    return f"{phase} {last_step(run_dir)}"
